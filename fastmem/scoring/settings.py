"""What a scoring pass is asked to do, what it will take, and whom it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastmem.errors import UsageError

# views of one forward pass: at this size a GPU is full and a hidden layer of RAR-XXL takes half a gigabyte
BATCH_VIEWS = 80


@dataclass(frozen=True)
class ScoreSettings:
    """What determines the numbers of a scoring pass, besides model and data.

    views: a number, or "center"; segments: names; per_class: images of each class, None for all; batch_size: views of
    one forward pass; activation: "post" or "pre" (the GELU); class_rows: "auto", "keep" or "drop"; seed: of folds and
    of the images taken per class; per_image: keep every image's loss and hits on its centre view; unconditional: its
    loss without a class too.
    """

    views: int | str = 10
    segments: tuple[str, ...] | None = None
    per_class: int | None = None
    batch_size: int = BATCH_VIEWS
    activation: str = "post"
    class_rows: str = "auto"
    seed: int = 0
    per_image: bool = False
    unconditional: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("post", "pre"):
            raise UsageError(f"expected activation post or pre, got {self.activation!r}")
        if self.class_rows not in ("auto", "keep", "drop"):
            raise UsageError(f"expected class_rows auto, keep or drop, got {self.class_rows!r}")
        if self.batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1 view, got {self.batch_size}")
        if self.views != "center" and not (isinstance(self.views, int) and self.views >= 1):
            raise UsageError(f"expected views as a number of at least 1 or center, got {self.views!r}")
        if self.unconditional and not self.per_image:
            raise UsageError("expected per_image=True with unconditional=True, got False: losses are kept per image")


@dataclass(frozen=True)
class TokenPlan:
    """What a pass will keep in the token cache: its folder, None without one; all images' bytes; the share of the
    images that is there already."""

    folder: Path | None = None
    total_bytes: int = 0
    stored: float = 0.0


@dataclass(frozen=True)
class ScorePlan:
    """What a pass will take, told before it starts: images of both sets, views of each, bytes on disk, seconds (None
    where they were not measured), and tokens in the cache."""

    images: int
    heldout_images: int
    views: int
    disk_bytes: int
    seconds: float | None
    tokens: TokenPlan = TokenPlan()


@dataclass(frozen=True)
class Reporter:
    """Whom a pass tells about itself; the defaults are silent.

    note: one sentence; planned: before the pass; advance: images done, from time to time.
    """

    note: Callable[[str], None] = field(default=lambda sentence: None)
    planned: Callable[[ScorePlan], None] = field(default=lambda plan: None)
    advance: Callable[[int], None] = field(default=lambda images: None)
