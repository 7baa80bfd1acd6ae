"""The GPU's forms of the augmentation against the plain reference and the CPU's kernels.

Triton's kernel runs in its interpreter, or on a GPU where there is one; PyTorch's operations run anywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from itertools import permutations
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.data.augment import AugmentConfig, Draws, SimCLR, apply_reference
from fasttrain_kernels.augment import packed
from fasttrain_kernels.augment.batched import augment_batched
from fasttrain_kernels.augment.cpu import augment_cpu, colour_cpu
from fasttrain_kernels.augment.gpu import augment_gpu
from tests.interpreter import needs_interpreter
from tests.launches import as_on_a_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
IMAGES = [(23, 31), (5, 9), (1, 40)]
SIZES = (6, 17, 33)
COLOURED = AugmentConfig(views=2, grey=0.5, solarise=0.4, blur=0.6, jitter_p=0.9)


def by_triton(*arguments) -> None:
    from fasttrain_kernels.augment import triton

    with mock.patch.object(triton, "TILE", 1024 if INTERPRETED else triton.TILE):  # it takes its time for each block
        triton.augment_triton(*arguments)


needs_triton = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or TRITON_INTERPRET=1")
FORMS = [pytest.param(augment_batched, id="batched"), pytest.param(by_triton, id="triton", marks=needs_triton)]
every_form = pytest.mark.parametrize("augment", FORMS)


class Source(NamedTuple):
    """Images, and what is drawn for them."""

    images: list[np.ndarray]
    draws: Draws


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77 if dtype == torch.uint8 else torch.nan, dtype=dtype, device=DEVICE)


@cache  # interpreted, it takes seconds
def views(augment, size: int, dtype: torch.dtype = torch.float32, count: int = len(IMAGES)) -> np.ndarray:
    """Of the first ``count`` images, [V, n, size, size, 3]."""
    images, draws = source()
    images, draws = images[:count], draws.take(slice(count))
    offsets = np.cumsum([0, *(image.size for image in images)])[:-1]
    sizes = np.int32([image.shape[:2] for image in images])
    pixels = np.concatenate([image.ravel() for image in images])
    given = [torch.from_numpy(x).to(DEVICE) for x in (pixels, offsets, sizes, packed(draws))]
    out = unwritten((COLOURED.views, count, size, size, 3), dtype)
    augment(*given, out)
    return out.cpu().numpy()


@cache
def source() -> Source:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), np.uint8) for size in IMAGES]
    sizes = np.array([image.shape[:2] for image in images])
    draws = SimCLR(COLOURED, 12).draw(0, np.arange(len(IMAGES)), sizes)
    draws.boxes[0, 0], draws.boxes[2, 1] = (0, 0, *sizes[0]), (0, 0, *sizes[2])
    return Source(images, draws)


def coloured(augment, levels: np.ndarray, draws: Draws) -> np.ndarray:
    """One view [n, S, S, 3] that is there already; ``draws`` [n]."""
    table = torch.from_numpy(packed(draws.take((slice(None), None)))).to(DEVICE)
    out = unwritten((1, *levels.shape), torch.float32)
    augment(torch.from_numpy(levels).to(DEVICE), None, None, table, out)
    return out[0].cpu().numpy()


def whole(levels: np.ndarray, draws: Draws) -> np.ndarray:
    """Of images that are not to be cropped, by the reference."""
    size = levels.shape[1]
    boxes, flip = np.tile(np.int32([0, 0, size, size]), (len(levels), 1)), np.zeros(len(levels), bool)
    draws = draws._replace(boxes=boxes, flip=flip)
    return np.stack([apply_reference(image, draws.take(i), size) for i, image in enumerate(levels)])


def exact_crop(image: np.ndarray, draws: Draws, size: int) -> np.ndarray:
    """Grey levels before they are rounded: a triangle over every pixel of the box, in float64."""
    top, left, height, width = draws.boxes
    sides = []
    for length in (height, width):
        centre = (np.arange(size)[:, None] + 0.5) * length / size
        weights = np.maximum(0, 1 - abs(np.arange(length) + 0.5 - centre) / max(length / size, 1))
        sides.append(weights / weights.sum(1, keepdims=True))
    view = np.einsum("yh,hwc,xw->yxc", sides[0], image[top : top + height, left : left + width], sides[1])
    return view[:, ::-1] if draws.flip else view


@every_form
@pytest.mark.parametrize("size", SIZES)
def test_crops_are_rounded_once(augment, size):
    given = source()
    found = views(augment, size, torch.uint8)
    assert given.draws.flip.any() and not given.draws.flip.all()
    plain = SimCLR(AugmentConfig(jitter_p=0, grey=0, blur=0), 5).draw(0, np.arange(len(IMAGES)), np.int32(IMAGES))
    plain = plain._replace(boxes=given.draws.boxes, flip=given.draws.flip)
    for view, i in np.ndindex(found.shape[:2]):
        level, draws = found[view, i].astype(int), plain.take((i, view))
        exact = exact_crop(given.images[i], draws, size)
        assert (abs(level - exact) <= 0.5 + 1e-4).all()
        pillows = 255 * apply_reference(given.images[i], draws, size)  # rounds after each direction
        assert abs(level - pillows).max() <= 1.001 and abs(level - pillows).mean() < 0.3


@every_form
@pytest.mark.parametrize("size", SIZES)
def test_colours_are_the_reference_s_on_equal_crops(augment, size):
    drawn = source().draws
    assert drawn.solarise.any() and drawn.grey.any() and not (drawn.contrast != 1).all()
    assert drawn.sigma.min() == 0 < drawn.sigma.max()
    levels, found = (views(augment, size, dtype) for dtype in (torch.uint8, torch.float32))
    for view in range(COLOURED.views):
        np.testing.assert_allclose(found[view], whole(levels[view], drawn.take((slice(None), view))), rtol=0, atol=1e-5)


@every_form
def test_colours_come_later_as_well(augment):
    levels, found = (views(augment, 17, dtype) for dtype in (torch.uint8, torch.float32))
    for view in range(COLOURED.views):
        draws = source().draws.take((slice(None), view))
        np.testing.assert_array_equal(coloured(augment, levels[view], draws), found[view])


@every_form
def test_a_long_blur(augment):
    """Of two taps and more a side, narrow and wide."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    draws = source().draws.take((slice(3), 0))._replace(sigma=np.float32([0.1, 0.4, 9.0]))
    np.testing.assert_allclose(coloured(augment, levels, draws), whole(levels, draws), rtol=0, atol=1e-5)


@every_form
def test_every_order(augment):
    orders = np.int8(list(permutations(range(4))))
    random, ones = np.random.default_rng(1), np.ones(len(orders), np.float32)
    levels = random.integers(0, 256, (len(orders), 6, 6, 3), np.uint8)
    none = np.zeros(len(orders), bool)
    boxes, hue = np.zeros((len(orders), 4), np.int32), 0.3 * ones
    draws = Draws(boxes, none, 1.6 * ones, 0.6 * ones, 1.7 * ones, hue, orders, none, 0 * ones, none)
    np.testing.assert_allclose(coloured(augment, levels, draws), whole(levels, draws), rtol=0, atol=1e-5)


@every_form
def test_as_the_cpu_s_kernels(augment):
    given, size = source(), 17
    levels, found = (views(augment, size, dtype) for dtype in (torch.uint8, torch.float32))
    pixels = np.concatenate([image.reshape(-1) for image in given.images])
    lengths = np.array([image.size for image in given.images])
    cpus, out = np.empty_like(levels), np.empty(levels[0].shape, np.float32)
    augment_cpu(pixels, np.cumsum(lengths) - lengths, np.int32(IMAGES), given.draws, cpus)
    difference = abs(cpus.astype(int) - levels)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    for view in range(COLOURED.views):
        colour_cpu(levels[view], given.draws.take((slice(None), view)), out)
        np.testing.assert_allclose(found[view], out, rtol=0, atol=1e-5)


@every_form
def test_one_image_and_what_lies_beside_it(augment):
    np.testing.assert_array_equal(views(augment, 6, count=1), views(augment, 6)[:, :1])


@needs_triton
def test_triton_s_crop_is_the_batched_one_to_the_bit():
    for size in SIZES:
        found, expected = (views(form, size, torch.uint8) for form in (by_triton, augment_batched))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(INTERPRETED, reason="notes what would be launched")
def test_a_batch_is_one_launch_without_a_wait():
    levels, table = torch.zeros(2, 3, 9, 9, 3, dtype=torch.uint8), torch.from_numpy(packed(source().draws))
    images = torch.zeros(10_000, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2).int()
    for pixels, out in ((images, levels.float()), (images, levels), ((levels, None, None), levels.float())):
        with as_on_a_gpu() as watch:
            augment_gpu(*pixels, table, out)
        assert dict(watch.launches) == {"_augment": 1} and not watch.waits


def test_what_does_not_fit_is_refused():
    table, out = torch.zeros(2, 3, 10, dtype=torch.int32), torch.zeros(2, 3, 8, 8, 3)
    pixels, starts, sizes = torch.zeros(99, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), torch.ones(3, 2).int()
    augment_gpu(pixels, starts[:0], sizes[:0], table[:, :0].contiguous(), out[:, :0].contiguous())
    for given in (
        (pixels, starts, sizes, table[:1], out),
        (pixels, starts, None, table, out),
        (pixels, None, sizes, table, out),
        (pixels, None, None, table, out),
        (pixels, starts.int(), sizes, table, out),
        (pixels, starts, sizes.long(), table, out),
        (pixels, starts, sizes, table.long(), out),
        (pixels.float(), starts, sizes, table, out),
        (pixels, starts, sizes, table, out.half()),
        (pixels, starts, sizes, table, out[..., :7, :]),
        (pixels, starts, sizes, table, out[0]),
        (out.byte(), None, None, table, out.byte()),
    ):
        with pytest.raises(ValueError, match="do not fit: see augment_gpu"):
            augment_gpu(*given)
    with pytest.raises(ValueError, match="give contiguous tensors on cpu"):
        augment_gpu(pixels, starts, sizes, table, out.transpose(2, 3))
    with pytest.raises(ValueError, match="give 2 or more"):
        augment_gpu(pixels, starts, sizes, table, out[:, :, :1, :1].contiguous())


@needs_interpreter
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests above run here")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton and not batched", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
