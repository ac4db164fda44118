"""Views: the crops of one picture that a model is shown, as its published training saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from fastmem.data.decoding import check_pixels
from fastmem.errors import UsageError

_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "lanczos": InterpolationMode.LANCZOS}


class Views(Protocol):
    """A picklable recipe that gives the same crops for the same picture and id, in any process."""

    @property
    def name(self) -> str:
        """The recipe and its settings in one word: equal names make equal crops."""

    @property
    def size(self) -> int:
        """Side S of a crop in pixels."""

    @property
    def count(self) -> int:
        """Number of crops V."""

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Cut an RGB picture into views, uint8 [V, S, S, 3]."""


@dataclass(frozen=True)
class TenCrop:
    """Four corners, the centre, and the same five of the mirror image (RAR).

    Before that the picture is cropped to the centre int(1.1 * size) square as ADM does it. A ``count`` below ten takes
    the first ones: top left, top right, bottom left, bottom right, centre, then the mirror image's.

    Source: bytedance/1d-tokenizer scripts/pretokenization.py; openai/guided-diffusion image_datasets.py.

    Raises:
        UsageError: ``size`` is below 1 or ``count`` is not in 1..10.
    """

    size: int
    count: int = 10

    def __post_init__(self) -> None:
        _check(self.size, self.count, most=10)

    @property
    def name(self) -> str:
        return f"ten-crop-{self.size}x{self.count}"

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Cut an RGB picture into views, uint8 [V, S, S, 3].

        Raises:
            DamagedImage: the picture is so long that resizing it would pass the pixel limit.
        """
        crops = functional.ten_crop(_adm_centre_crop(image, int(1.1 * self.size)), self.size)
        return np.stack([np.asarray(crop) for crop in crops[: self.count]])


@dataclass(frozen=True)
class CenterCrop:
    """The centre square after the short side was resized to ``resize`` (default: the crop's size).

    RAR: bicubic to S; VAR: Lanczos to round(1.125 * S).

    Raises:
        UsageError: ``size`` is below 1, ``resize`` below ``size``, or the filter is unknown.
    """

    size: int
    resize: int | None = None
    filter: str = "bicubic"
    count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check(self.size, self.count)
        if self.resize is not None and self.resize < self.size:
            raise UsageError(
                f"expected a resized short side of at least the crop's {self.size} pixels, got {self.resize}; raise it"
            )
        if self.filter not in _FILTERS:
            raise UsageError(f"expected a filter out of {', '.join(_FILTERS)}, got {self.filter!r}; choose one of them")

    @property
    def name(self) -> str:
        return f"center-crop-{self.size}-{self.resize or self.size}-{self.filter}"

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Cut an RGB picture into one view, uint8 [1, S, S, 3].

        Raises:
            DamagedImage: the picture is so long that resizing it would pass the pixel limit.
        """
        resized = _resize_short_side(image, self.resize or self.size, _FILTERS[self.filter])
        return np.array(functional.center_crop(resized, self.size))[None]


@dataclass(frozen=True)
class RandomCrops:
    """Random squares after a Lanczos resize of the short side to round(ratio * size), without flips (VAR).

    View v of an image depends on the image's id and v alone.

    Source: FoundationVision/VAR utils/data.py.

    Raises:
        UsageError: ``size`` or ``count`` is below 1, or ``ratio`` below 1.
    """

    size: int
    count: int = 10
    ratio: float = 1.125

    def __post_init__(self) -> None:
        _check(self.size, self.count)
        if not self.ratio >= 1:
            raise UsageError(f"expected a resize ratio of at least 1, got {self.ratio}; raise it")

    @property
    def name(self) -> str:
        return f"random-crops-{self.size}x{self.count}-{self.ratio}"

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Cut an RGB picture into views, uint8 [V, S, S, 3].

        Raises:
            DamagedImage: the picture is so long that resizing it would pass the pixel limit.
        """
        pixels = np.asarray(_resize_short_side(image, round(self.ratio * self.size), _FILTERS["lanczos"]))
        height, width, _ = pixels.shape
        crops = []
        for view in range(self.count):
            # raw draws: numpy keeps a bit generator's stream across versions, but not what is made from it
            down, right = np.random.PCG64([image_id, view]).random_raw(2).tolist()
            top, left = down % (height - self.size + 1), right % (width - self.size + 1)
            crops.append(pixels[top : top + self.size, left : left + self.size])
        return np.stack(crops)


@dataclass(frozen=True)
class Joined:
    """The views of two recipes of one size, one after the other."""

    first: Views
    second: Views

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.second.name}"

    @property
    def size(self) -> int:
        return self.first.size

    @property
    def count(self) -> int:
        return self.first.count + self.second.count

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        return np.concatenate([self.first(image, image_id), self.second(image, image_id)])


def to_unit_range(images: Tensor) -> Tensor:
    """Pictures uint8 [N,S,S,3] in 0..255 to float32 [N,3,S,S] in [0,1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Mirrored:
    """The views of another recipe as in a mirror, left and right exchanged."""

    recipe: Views

    @property
    def name(self) -> str:
        return f"mirrored-{self.recipe.name}"

    @property
    def size(self) -> int:
        return self.recipe.size

    @property
    def count(self) -> int:
        return self.recipe.count

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        return self.recipe(image, image_id)[:, :, ::-1]


def _check(size: int, count: int, most: int | None = None) -> None:
    if size < 1:
        raise UsageError(f"expected views of at least 1 pixel, got {size}; give the model's image size")
    if count < 1 or (most is not None and count > most):
        wanted = "at least 1 view" if most is None else f"1 to {most} views"
        raise UsageError(f"expected {wanted}, got {count}; choose a number in that range")


def _resize_short_side(image: Image.Image, short: int, mode: InterpolationMode) -> Image.Image:
    # a picture of one pixel by a million is small until its short side is stretched
    long = short * max(image.size) // min(image.size)
    check_pixels(*((long, short) if image.width > image.height else (short, long)))
    return functional.resize(image, short, mode)


def _adm_centre_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    check_pixels(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
