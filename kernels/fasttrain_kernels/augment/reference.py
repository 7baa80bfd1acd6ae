"""A view made the obvious way: what every other implementation is tested against."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fasttrain_kernels.augment.draws import Draws

LUMA = (0.2989, 0.587, 0.114)
"Of red, green and blue: torchvision's, which sum to 0.9999."


def blur_radius(size: int) -> int:
    """Half-width of the blur's kernel: SimCLR's kernel is a tenth of the image, made odd, and at least 3 taps."""
    return max(1, size // 10 // 2)


def apply_reference(image: np.ndarray, draws: Draws, size: int) -> np.ndarray:
    """One view the obvious way: PIL's antialiased bilinear crop-resize, flip, then the colour operations in float64.

    Args:
        image: uint8 [H, W, 3].
        draws: of one sample and view (``draws.take((sample, view))``).

    Returns:
        float32 [size, size, 3] in [0, 1].
    """
    top, left, height, width = (int(x) for x in draws.boxes)
    box = (left, top, left + width, top + height)
    crop = Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BILINEAR)
    x = np.asarray(crop, np.float64) / 255
    if draws.flip:
        x = x[:, ::-1]
    for operation in draws.order:
        if operation == 0:
            x = np.clip(x * draws.brightness, 0, 1)
        elif operation == 1:
            x = np.clip(draws.contrast * x + (1 - draws.contrast) * _luma(x).mean(), 0, 1)
        elif operation == 2:
            x = np.clip(draws.saturation * x + (1 - draws.saturation) * _luma(x), 0, 1)
        else:
            x = _rotate_hue(x, float(draws.hue))
    if draws.grey:
        x = np.repeat(_luma(x), 3, axis=2)
    if draws.sigma > 0:
        x = _blur(x, float(draws.sigma), blur_radius(size))
    if draws.solarise:
        x = np.where(x >= 0.5, 1 - x, x)
    return x.astype(np.float32)


def _luma(x: np.ndarray) -> np.ndarray:
    return x @ np.array(LUMA)[:, None]


def _rotate_hue(x: np.ndarray, turns: float) -> np.ndarray:
    """RGB -> HSV, hue + turns, -> RGB, by the six sectors of the colour wheel."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value, chroma = x.max(axis=2), x.max(axis=2) - x.min(axis=2)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe], 4 + (red - green) / safe
    )
    hue = (hue / 6 + turns) % 1.0 * 6
    sector = np.floor(hue).astype(int) % 6
    fraction = hue - np.floor(hue)
    p, q, t = value - chroma, value - chroma * fraction, value - chroma * (1 - fraction)
    wheel = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)]
    return np.stack([np.choose(sector, [step[channel] for step in wheel]) for channel in range(3)], axis=2)


def _blur(x: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Separable Gaussian with reflected borders (the border pixel itself not repeated)."""
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = sum(tap * padded[k : k + x.shape[0]] for k, tap in enumerate(taps))
    return sum(tap * rows[:, k : k + x.shape[1]] for k, tap in enumerate(taps))


__all__ = ["LUMA", "apply_reference", "blur_radius"]
