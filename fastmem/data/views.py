"""View recipes: how a picture is cut into the crops (views) that a model saw in its published training."""

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
    """A view recipe: a function that cuts a picture into crops, the same for the same picture and id in any process.

    A recipe can be pickled, so that worker processes can use it.
    """

    @property
    def name(self) -> str:
        """Name of the recipe with its settings, without spaces; recipes of equal name make equal crops."""

    @property
    def size(self) -> int:
        """Side S of a crop, in pixels."""

    @property
    def count(self) -> int:
        """Number V of crops of one picture."""

    def __call__(self, image: Image.Image, image_id: int) -> np.ndarray:
        """Return the crops of an RGB picture, uint8 [V, S, S, 3] in [0, 255]; random crops depend on ``image_id``."""


@dataclass(frozen=True)
class TenCrop:
    """Ten crops of a picture, as RAR was trained on: the four corners and the centre, and those of its mirror image.

    Beforehand the picture is reduced to its centre square of int(1.1 * size) pixels by the method of ADM. ``size`` is
    the side of a crop in pixels. A ``count`` below ten takes the first crops in this order: top left, top right, bottom
    left, bottom right, centre, then the same five of the mirror image.

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
        """Return the crops of an RGB picture, uint8 [V, S, S, 3] in [0, 255].

        Raises:
            DamagedImage: the picture is so elongated that it would exceed the pixel limit when resized.
        """
        crops = functional.ten_crop(_adm_centre_crop(image, int(1.1 * self.size)), self.size)
        return np.stack([np.asarray(crop) for crop in crops[: self.count]])


@dataclass(frozen=True)
class CenterCrop:
    """The centre square of ``size`` pixels, after the short side of the picture was resized to ``resize`` pixels.

    ``resize`` is ``size`` by default, and ``filter`` is "bicubic" or "lanczos". RAR resizes to ``size`` by the bicubic
    filter, and VAR to round(1.125 * size) by the Lanczos filter.

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
        """Return the one crop of an RGB picture, uint8 [1, S, S, 3] in [0, 255].

        Raises:
            DamagedImage: the picture is so elongated that it would exceed the pixel limit when resized.
        """
        resized = _resize_short_side(image, self.resize or self.size, _FILTERS[self.filter])
        return np.array(functional.center_crop(resized, self.size))[None]


@dataclass(frozen=True)
class RandomCrops:
    """Square crops at random places, as VAR was trained on, without flips.

    Beforehand the short side of the picture is resized to round(ratio * size) pixels by the Lanczos filter. ``size`` is
    the side of a crop in pixels, and ``count`` the number of crops. The place of a crop depends on the image's id and
    on the crop's number alone.

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
        """Return the crops of an RGB picture, uint8 [V, S, S, 3] in [0, 255].

        Raises:
            DamagedImage: the picture is so elongated that it would exceed the pixel limit when resized.
        """
        pixels = np.asarray(_resize_short_side(image, round(self.ratio * self.size), _FILTERS["lanczos"]))
        height, width, _ = pixels.shape
        crops = []
        for view in range(self.count):
            # raw bits, because numpy keeps them the same across versions, but not the random numbers made from them
            down, right = np.random.PCG64([image_id, view]).random_raw(2).tolist()
            top, left = down % (height - self.size + 1), right % (width - self.size + 1)
            crops.append(pixels[top : top + self.size, left : left + self.size])
        return np.stack(crops)


@dataclass(frozen=True)
class Joined:
    """The views of two recipes of equal crop size: those of ``first``, then those of ``second``."""

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
    """Convert pictures, uint8 [N,S,S,3] in [0,255], to float32 [N,3,S,S] in [0,1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Mirrored:
    """The views of another recipe, each mirrored left to right."""

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
    # a picture of 1 by 1,000,000 pixels is within the limit before its short side is enlarged, but not after
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
