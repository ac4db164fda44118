"""What a scoring pass is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from fastmem.errors import UsageError

# views of one forward pass: at this size a GPU is full and a hidden layer of RAR-XXL takes half a gigabyte
BATCH_VIEWS = 80


@dataclass(frozen=True)
class ScoreSettings:
    """What determines the numbers of a scoring pass, besides model and data.

    Attributes:
        views: how many views of each image, or "center" for the centre view alone.
        segments: names of the segments; None for the model's default ones.
        per_class: images of each class, drawn evenly; None for all.
        batch_size: views of one forward pass.
        activation: "post" takes responses after the GELU, "pre" before it.
        class_rows: "keep" keeps the statistics of every class, "drop" only their summary; "auto" keeps them up to
            2 GiB.
        seed: draws the folds and the images taken of each class.
        per_image: whether every image's loss and hits on its centre view are kept.
        unconditional: whether its loss without a class is kept too.

    Raises: UsageError for an unknown word, a number below 1, or ``unconditional`` without ``per_image``.
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
