"""Views: the crops equal those of the published pipelines, bit for bit, and depend on nothing but image and id."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as published

from fastmem.data.decoding import DamagedImage
from fastmem.data.views import CenterCrop, RandomCrops, TenCrop, Views
from fastmem.errors import UsageError

# smaller than the view, exact, both orientations, odd, and large enough to be halved once and twice
SIZES = [(20, 31), (64, 64), (70, 70), (71, 93), (93, 71), (150, 140), (301, 480), (33, 333)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
every_recipe = pytest.mark.parametrize(
    "recipe",
    [
        TenCrop(64),
        TenCrop(63, count=3),
        CenterCrop(64),
        CenterCrop(63, 71, "lanczos"),
        RandomCrops(64),
        RandomCrops(63, 3),
    ],
    ids=lambda recipe: recipe.name,
)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def adm_centre_crop(image: Image.Image, size: int) -> Image.Image:
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    pixels = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return Image.fromarray(pixels[top : top + size, left : left + size])


@sizes
@pytest.mark.parametrize("side", [64, 63, 16, 1])
def test_ten_crop_equals_torchvision_after_the_adm_crop(size: tuple[int, int], side: int) -> None:
    image = picture(*size)
    expected = published.ten_crop(adm_centre_crop(image, int(1.1 * side)), [side, side])
    views = TenCrop(side)(image, 1)
    assert (views.shape, views.dtype) == ((10, side, side, 3), np.uint8)
    for view, crop in zip(views, expected, strict=True):
        assert np.array_equal(view, crop)


def test_ten_crop_takes_the_first_of_the_ten() -> None:
    image = picture(90, 80)
    whole = TenCrop(64)(image, 1)
    for count in (1, 7, 10):
        assert np.array_equal(TenCrop(64, count=count)(image, 1), whole[:count])


@sizes
@pytest.mark.parametrize(
    ("recipe", "resize", "mode"),
    [
        pytest.param(CenterCrop(64), 64, InterpolationMode.BICUBIC, id="rar"),
        pytest.param(CenterCrop(64, 72, "lanczos"), 72, InterpolationMode.LANCZOS, id="var"),
        pytest.param(CenterCrop(63, 70), 70, InterpolationMode.BICUBIC, id="odd"),
    ],
)
def test_center_crop_equals_torchvision(
    size: tuple[int, int], recipe: CenterCrop, resize: int, mode: InterpolationMode
) -> None:
    image = picture(*size)
    expected = published.center_crop(published.resize(image, resize, mode), [recipe.size, recipe.size])
    views = recipe(image, 1)
    assert views.shape == (1, recipe.size, recipe.size, 3)
    assert np.array_equal(views[0], expected)


@sizes
def test_random_crops_are_cut_from_the_lanczos_resize(size: tuple[int, int]) -> None:
    image = picture(*size)
    resized = np.asarray(published.resize(image, 72, InterpolationMode.LANCZOS))
    windows = np.lib.stride_tricks.sliding_window_view(resized, (64, 64), axis=(0, 1))
    corners = {window[..., 0, 0].tobytes() + window[..., 5, 5].tobytes() for row in windows for window in row}
    for view in RandomCrops(64)(image, 3):
        assert view[0, 0].tobytes() + view[5, 5].tobytes() in corners


def test_random_crops_depend_on_id_and_view_alone() -> None:
    image = picture(300, 280)
    views = RandomCrops(64, count=10)(image, 2**63 - 1)
    assert np.array_equal(views, RandomCrops(64, count=10)(image, 2**63 - 1))
    assert np.array_equal(views[:3], RandomCrops(64, count=3)(image, 2**63 - 1))
    assert not np.array_equal(views, RandomCrops(64, count=10)(image, 2**63 - 2))
    assert len({view.tobytes() for view in views}) > 5


def test_random_crops_stay_where_they_are() -> None:
    # the pixel's value is its position, so this pins the places themselves
    rows = np.broadcast_to(np.arange(18, dtype=np.uint8)[:, None, None], (18, 18, 3))
    columns = rows.transpose(1, 0, 2)
    recipe = RandomCrops(16, count=6)
    down, right = (recipe(Image.fromarray(np.ascontiguousarray(at)), 5)[:, 0, 0, 0].tolist() for at in (rows, columns))
    assert (down, right) == ([1, 1, 0, 2, 0, 2], [0, 0, 0, 0, 0, 2])


def test_random_crops_reach_every_place() -> None:
    image = Image.fromarray(np.broadcast_to(np.arange(18, dtype=np.uint8)[:, None, None], (18, 18, 3)).copy())
    assert set(RandomCrops(16, count=64)(image, 8)[:, 0, 0, 0].tolist()) == {0, 1, 2}


@every_recipe
def test_recipes_are_values_that_travel(recipe: Views) -> None:
    image = picture(90, 80)
    copy = pickle.loads(pickle.dumps(recipe))
    assert (copy, copy.name, copy.count) == (recipe, recipe.name, recipe.count)
    views = recipe(image, 9)
    assert views.shape == (recipe.count, recipe.size, recipe.size, 3)
    assert np.array_equal(copy(image, 9), views)
    assert np.array_equal(image, picture(90, 80))


def test_names_tell_recipes_apart() -> None:
    recipes = [
        *(TenCrop(64), TenCrop(64, 9), TenCrop(32)),
        *(CenterCrop(64), CenterCrop(64, 72), CenterCrop(64, 72, "lanczos"), CenterCrop(32)),
        *(RandomCrops(64), RandomCrops(64, 9), RandomCrops(64, ratio=1.25), RandomCrops(32)),
    ]
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert CenterCrop(64).name == CenterCrop(64, 64).name


@every_recipe
def test_a_picture_that_resizing_would_blow_up_is_damaged(recipe: Views) -> None:
    with pytest.raises(DamagedImage, match="huge: "):
        recipe(Image.new("RGB", (100_000, 1)), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: TenCrop(0), "at least 1 pixel, got 0", id="ten crop of no size"),
        pytest.param(lambda: TenCrop(64, count=11), "1 to 10 views, got 11", id="eleven of ten crops"),
        pytest.param(lambda: TenCrop(64, count=0), "1 to 10 views, got 0", id="none of ten crops"),
        pytest.param(lambda: RandomCrops(64, count=0), "at least 1 view, got 0", id="no random crop"),
        pytest.param(lambda: RandomCrops(64, ratio=0.9), "ratio of at least 1, got 0.9", id="ratio below one"),
        pytest.param(lambda: RandomCrops(64, ratio=float("nan")), "ratio of at least 1", id="no ratio"),
        pytest.param(lambda: CenterCrop(64, 63), "at least the crop's 64 pixels, got 63", id="resize below size"),
        pytest.param(lambda: CenterCrop(64, filter="box"), "bicubic, lanczos, got 'box'", id="unknown filter"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
