"""Structured transformations against plain loops, the augmentation's reference and, where it is there, Kornia."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fasttrain.attacks.structured import (
    StructuredConfig,
    colour_space,
    jitter,
    make_transformation,
    rotate,
    translate,
)
from fasttrain.config import resolve
from fasttrain.data.augment import Draws, apply_reference
from fasttrain.errors import UsageError

NAMES = ("colour_space", "rotation", "translation", "colour_jitter")


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The value [3] of an image [3, H, W], black outside, at column x and row y."""
    total = np.zeros(3)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


def warped(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """out(p) = image(matrix p + offset), p = (x, y) in pixels from the centre."""
    _, height, width = image.shape
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            out[:, row, column] = bilinear(image, *(matrix @ (np.array([column, row]) - centre) + offset + centre))
    return out


def test_rotation_is_bilinear_about_the_centre_of_an_image_of_any_shape():
    images, degrees = pictures(3, 5, 8), torch.tensor([17.0, -90.0, 200.0], dtype=torch.float64)
    for image, angle, found in zip(images, degrees.deg2rad(), rotate(images, degrees), strict=True):
        cos, sin = math.cos(angle), math.sin(angle)  # y points down: this turns counter-clockwise
        expected = warped(image.numpy(), np.array([[cos, -sin], [sin, cos]]), np.zeros(2))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-13)
    square = pictures(1, 6, 6)
    quarter = rotate(square, torch.tensor([90.0], dtype=torch.float64))
    np.testing.assert_allclose(quarter[0].numpy(), np.rot90(square[0].numpy(), axes=(1, 2)), atol=1e-12)


def test_translation_is_bilinear_and_in_shares_of_the_sides():
    images = pictures(2, 5, 8)
    shift = torch.tensor([[0.25, -0.2], [0.11, 0.07]], dtype=torch.float64)
    found = translate(images, shift)
    for image, (right, down), one in zip(images, shift.tolist(), found, strict=True):
        expected = warped(image.numpy(), np.eye(2), np.array([-8 * right, -5 * down]))
        np.testing.assert_allclose(one.numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(found[0, :, :4, 2:].numpy(), images[0, :, 1:, :6].numpy(), atol=1e-13)
    assert found[0, :, 4].abs().max() < 1e-13 and found[0, :, :, :2].abs().max() < 1e-13


def test_colour_space_is_the_sum_over_channels():
    images = pictures(2, 3, 4)
    alpha = torch.rand(2, 3, 3, dtype=torch.float64).softmax(-1)
    expected = torch.zeros_like(images)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                expected[b, i] += alpha[b, i, j] * images[b, j]
    torch.testing.assert_close(colour_space(images, alpha), expected, rtol=1e-14, atol=0)


def test_jitter_is_the_augmentation_s_in_the_order_brightness_contrast_saturation_hue():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    change = np.random.default_rng(1).uniform(-0.4, 0.4, (4, 4))
    found = jitter(torch.from_numpy(images).movedim(-1, 1) / 255.0, torch.from_numpy(change)).movedim(1, -1)
    for image, c, one in zip(images, change, found, strict=True):
        whole, order = np.array([0, 0, 6, 6]), np.arange(4)
        draws = Draws(whole, False, 1 + c[0], 1 + c[1], 1 + c[2], c[3], order, False, 0.0, False)
        np.testing.assert_allclose(one.numpy(), apply_reference(image, draws, 6), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    """By the constants and by the images, in float64."""
    family = make_transformation(StructuredConfig(transformations=(name,)), name)
    numbers = torch.randn(2, len(family.start), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = 0.25 + 0.5 * pictures(2, 4, 5)
    assert gradcheck(
        lambda x, n: family.apply(x, family.bound(n)), (images.requires_grad_(), numbers.requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_constants_stay_in_their_ranges_and_images_in_0_1(name):
    config = StructuredConfig(transformations=(name,))
    family = make_transformation(config, name)
    numbers = 3 * torch.randn(50, len(family.start), dtype=torch.float64)
    constants = family.bound(numbers)
    assert len(family.constants) == constants.shape[1]
    if name == "colour_space":
        assert (constants >= 0).all()
        torch.testing.assert_close(constants.view(50, 3, 3).sum(-1), torch.ones(50, 3, dtype=torch.float64))
    else:
        largest = {"rotation": [30.0], "translation": [0.125] * 2, "colour_jitter": [0.4, 0.4, 0.4, 0.1]}[name]
        assert (constants.abs() <= torch.tensor(largest, dtype=torch.float64)).all()
        assert (constants.abs().amax(0) > 0.9 * torch.tensor(largest, dtype=torch.float64)).all()
    changed = family.apply(pictures(50, 4, 4), constants)
    assert changed.min() >= 0 and changed.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_start_changes_nothing_and_of_colour_a_tenth(name):
    family = make_transformation(StructuredConfig(transformations=(name,)), name)
    images = pictures(3, 6, 5)
    constants = family.bound(torch.tensor([family.start] * 3, dtype=torch.float64))
    changed = family.apply(images, constants)
    if name == "colour_space":
        torch.testing.assert_close(constants[0].view(3, 3), 0.85 * torch.eye(3, dtype=torch.float64) + 0.05)
    else:
        torch.testing.assert_close(changed, images, rtol=0, atol=1e-12)


def test_warps_and_colours_are_kornia_s():
    """Its contrast is another: a factor on the values, not on their distance from the mean."""
    pytest.importorskip("kornia")
    from kornia import enhance
    from kornia.geometry import transform

    images = pictures(3, 8, 6)
    degrees = torch.tensor([10.0, -75.0, 160.0], dtype=torch.float64)
    torch.testing.assert_close(rotate(images, degrees), transform.rotate(images, degrees), rtol=0, atol=1e-6)
    shift = torch.tensor([[0.1, 0.2], [-0.3, 0.05], [0.0, -0.4]], dtype=torch.float64)
    pixels = shift * torch.tensor([6.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(translate(images, shift), transform.translate(images, pixels), rtol=0, atol=1e-6)
    turns = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    change = torch.zeros(3, 4, dtype=torch.float64)
    change[:, 3] = turns
    expected = enhance.adjust_hue(images, 2 * math.pi * turns)
    torch.testing.assert_close(jitter(images, change), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transformations": ["rotation"], "shift": 0.2}, "shift=0.2: only translation uses it"),
        ({"transformations": ["rotation", "rotation"]}, "give each once"),
        ({"transformations": []}, "transformations"),
        ({"transformations": ["shear"]}, "transformations"),
        ({"lr_factor": 0}, "lr_factor"),
    ],
)
def test_configuration_refuses(values, message):
    with pytest.raises(UsageError, match=message):
        resolve(StructuredConfig, values)


def test_bounds_are_made_without_a_tensor_of_them():
    config, numbers = StructuredConfig(transformations=NAMES), torch.randn(5, 4, generator=torch.Generator())
    most = 0.8 * config.jitter
    for name, largest in (
        ("rotation", [config.degrees]),
        ("translation", [config.shift] * 2),
        ("colour_jitter", [most, most, most, 0.2 * config.jitter]),
    ):
        given = numbers[:, : len(largest)]
        found = make_transformation(config, name).bound(given)
        assert torch.equal(found, given.tanh() * torch.tensor(largest)), name
