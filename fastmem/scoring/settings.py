"""The settings of a scoring pass."""

from __future__ import annotations

from dataclasses import dataclass

from fastmem.errors import UsageError

# views in one forward pass: this many keep a GPU busy, and a hidden layer of RAR-XXL then takes half a gigabyte
BATCH_VIEWS = 80


@dataclass(frozen=True)
class ScoreSettings:
    """The settings of a scoring pass that its results depend on, besides model and images.

    Attributes:
        views: number of views of each image, or "center" for the centre view alone.
        segments: names of the segments; None for the model's default ones.
        per_class: number of images of each class, chosen by ``seed``; None for all.
        batch_size: number of views in one forward pass.
        activation: "post" for responses after the GELU, "pre" for responses before it.
        class_rows: "keep" keeps the statistics of every class, "drop" only their summary, and "auto" keeps them up to
            2 GiB.
        seed: chooses the folds, and the images of each class.
        per_image: keep the loss and hits of every image on its centre view.
        unconditional: also keep the loss of every image without a class.

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
