"""The fused CPU kernel, the batched torch operations and the plain reference agree, and the reference is right."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.data.augment import AugmentConfig, Draws, SimCLR, apply_reference, blur_radius
from fasttrain.data.finish import FinishOnGpu
from fasttrain.data.prefetch import Decoded
from fasttrain_kernels.augment.cpu import colour_cpu
from fasttrain_kernels.augment.draws import packed
from fasttrain_kernels.augment.gpu import augment_gpu

SIZES = (8, 9, 37, 64)


def make_images(n: int, size: int) -> np.ndarray:
    """Noise, with a grey, a black, a white and a fully saturated image among them."""
    images = np.random.default_rng(size).integers(0, 256, (n, size, size, 3), np.uint8)
    images[1] = images[1, :, :, :1]
    images[2], images[3] = 0, 255
    images[4] = images[4] // 128 * 255
    return images


def make_draws(n: int, size: int, **changes) -> Draws:
    config = AugmentConfig(views=1, size=size, grey=0.3, solarise=0.3, blur=0.7)
    draws = SimCLR(config, 3).draw(0, np.arange(n), np.full((n, 2), size)).take((slice(None), 0))
    arrays = {name: np.full_like(getattr(draws, name), value) for name, value in changes.items()}
    return draws._replace(boxes=np.tile(np.int32([0, 0, size, size]), (n, 1)), flip=np.zeros(n, bool), **arrays)


def none(n: int, size: int, **changes) -> Draws:
    off = dict(brightness=1, contrast=1, saturation=1, hue=0, grey=False, sigma=0, solarise=False)
    return make_draws(n, size, **(off | changes))


def by_reference(images: np.ndarray, draws: Draws) -> np.ndarray:
    return np.stack([apply_reference(image, draws.take(i), image.shape[0]) for i, image in enumerate(images)])


def by_numpy(images: np.ndarray, draws: Draws) -> np.ndarray:
    out = np.full(images.shape, np.nan, np.float32)
    colour_cpu(images, draws, out)
    return out


def by_torch(images: np.ndarray, draws: Draws, device: str = "cpu") -> np.ndarray:
    pixels = torch.from_numpy(images).to(device)
    table = torch.from_numpy(packed(draws.take((slice(None), None)))).to(device)
    out = torch.empty((1, *images.shape), device=device)
    augment_gpu(pixels, None, None, table, out)
    return out[0].cpu().numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("apply", [by_numpy, by_torch])
def test_agrees_with_the_reference(apply, size):
    images, draws = make_images(48, size), make_draws(48, size)
    difference = abs(apply(images, draws) - by_reference(images, draws))
    assert np.median(difference.max(axis=(1, 2, 3))) < 1e-6
    # Solarise jumps at 0.5: a value within rounding of it may fall to the other side (x and 1 - x are then close too).
    assert difference.max() < 1e-5


@pytest.mark.parametrize("apply", [by_numpy, by_torch])
@pytest.mark.parametrize(
    "changes",
    [{"brightness": 1.7}, {"contrast": 0.2}, {"contrast": 1.8}, {"saturation": 0.0}, {"saturation": 1.8}]
    + [{"hue": hue} for hue in (-0.5, -0.2, 0.001, 0.2, 0.5)]
    + [{"grey": True}, {"sigma": 0.1}, {"sigma": 2.0}, {"solarise": True}, {"brightness": 0.0}],
    ids=str,
)
def test_each_operation_alone(apply, changes):
    images, draws = make_images(8, 50), none(8, 50, **changes)
    np.testing.assert_allclose(apply(images, draws), by_reference(images, draws), atol=4e-6)


@pytest.mark.parametrize("apply", [by_numpy, by_torch])
def test_nothing_drawn_changes_nothing(apply):
    images = make_images(8, 33)
    np.testing.assert_allclose(apply(images, none(8, 33)), images / 255, atol=1e-6)


@pytest.mark.parametrize("first, second", [("brightness", "contrast"), ("contrast", "brightness")])
def test_the_drawn_order_is_followed(first, second):
    images = make_images(8, 16)
    draws = none(8, 16, brightness=1.8, contrast=0.5)
    names = ("brightness", "contrast", "saturation", "hue")
    rest = [name for name in names if name not in (first, second)]
    draws = draws._replace(order=np.tile(np.int8([names.index(name) for name in (first, second, *rest)]), (8, 1)))
    x = images.astype(np.float64) / 255
    for name in (first, second):
        luma = (x * [0.2989, 0.587, 0.114]).sum(axis=3).mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
        x = np.clip(1.8 * x if name == "brightness" else 0.5 * x + 0.5 * luma, 0, 1)
    np.testing.assert_allclose(by_numpy(images, draws), x, atol=1e-6)


def test_reference_hue_is_colorsys():
    images, draws = make_images(8, 8), none(8, 8, hue=0.3)
    for image, turned in zip(images, by_reference(images, draws), strict=True):
        for before, after in zip(image.reshape(-1, 3) / 255, turned.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            np.testing.assert_allclose(after, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_reference_blur_is_scipys(sigma):
    images, draws = make_images(5, 64), none(5, 64, sigma=sigma)
    options = dict(sigma=sigma, axes=(1, 2), mode="mirror", radius=blur_radius(64))
    expected = ndimage.gaussian_filter(images.astype(np.float64) / 255, **options)
    np.testing.assert_allclose(by_reference(images, draws), expected, atol=1e-6)


def test_an_image_does_not_depend_on_its_neighbours():
    images, draws = make_images(16, 40), make_draws(16, 40)
    whole = by_numpy(images, draws)
    for i in (0, 7, 15):
        np.testing.assert_array_equal(by_numpy(images[i : i + 1], draws.take([i])), whole[i : i + 1])
    assert by_numpy(images[:0], draws.take(slice(0, 0))).shape == (0, 40, 40, 3)
    assert by_torch(images[:0], draws.take(slice(0, 0))).shape == (0, 40, 40, 3)


def test_results_stay_in_range():
    images, draws = make_images(64, 24), make_draws(64, 24)
    for result in (by_numpy(images, draws), by_torch(images, draws)):
        assert np.isfinite(result).all() and result.min() >= 0 and result.max() <= 1 + 1e-6


def test_all_that_is_drawn_goes_to_a_gpu_in_one_copy():
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            hosts = [x for x in arguments if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
            if hosts and isinstance(result, torch.Tensor) and result.device.type == "meta":
                copies.append(tuple(result.shape))
            return result

    images, draws = make_images(48, 32), make_draws(48, 32)
    assert draws.grey.any() and draws.solarise.any() and (draws.sigma > 0).any()
    drawn = Draws(*(np.stack([field, field], axis=1) for field in draws))
    with Watch():
        decoded = Decoded([images, images], drawn, np.arange(48), np.arange(48))
        FinishOnGpu(True, torch.device("meta"))(decoded)
    assert copies == [(48, 32, 32, 3)] * 2 + [(2, 48, 10)] + [(48,)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_the_reference():
    images, draws = make_images(48, 64), make_draws(48, 64)
    np.testing.assert_allclose(by_torch(images, draws, "cuda"), by_reference(images, draws), atol=1e-5)
