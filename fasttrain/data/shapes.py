"""The embedded default data set: small drawings whose class is a form, and whose colour says nothing.

An image of class *star* shows several stars, each of its own colour, pose and contrast, over a random background; so
two crops of an image share the form and little else, which is what a contrastive method can find in minutes. Two of the
classes fill the image (stripes, checks); the same patterns occur faintly behind the other ten.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fasttrain.errors import UsageError

SIDE = 48  # pixels
COUNTS = {"train": 300, "val": 80}  # images a class
VERSION = 1  # of the drawings: another one gets a folder of its own

_SUPERSAMPLING = 4
_SEED = 20
_TRIES = 24
_GRID = np.mgrid[:SIDE, :SIDE].astype(np.float64)  # [2, SIDE, SIDE]
_LUMA = np.array([0.299, 0.587, 0.114])

Polygon = np.ndarray  # [points, 2], within the unit circle


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _regular(corners: int) -> Polygon:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(spikes: int, inner: float) -> Polygon:
    return _regular(2 * spikes) * np.tile([1.0, inner], spikes)[:, None]


def _heart() -> Polygon:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 17


def _spiral(turns: float = 2.0, width: float = 0.3) -> Polygon:
    t = np.linspace(0.15, 1, 64)
    inner, outer = t * (1 - width), t
    radii, angles = np.concatenate([outer, inner[::-1]]), turns * 2 * np.pi * np.concatenate([t, t[::-1]])
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_DISC = _regular(32)
_SQUARE = _regular(4)
_ARM = np.array([[0.95, -0.3], [0.95, 0.3], [0.3, 0.3]])  # one arm of the cross, to be turned
_CROSS = np.concatenate([_ARM @ _rotation(angle).T for angle in np.arange(4) * np.pi / 2])
_ARROW = np.array([[-1.0, -0.25], [0.1, -0.25], [0.1, -0.75], [1.0, 0.0], [0.1, 0.75], [0.1, 0.25], [-1.0, 0.25]])

FORMS: dict[str, tuple[Polygon, ...]] = {  # the outline, then what is cut out of it
    "arrow": (_ARROW,),
    "crescent": (_DISC, 0.85 * _DISC + [0.45, 0.0]),
    "cross": (_CROSS,),
    "disc": (_DISC,),
    "frame": (_SQUARE, 0.6 * _SQUARE),
    "heart": (_heart(),),
    "ring": (_DISC, 0.6 * _DISC),
    "spiral": (_spiral(),),
    "star": (_star(5, 0.4),),
    "triangle": (_regular(3),),
}
PATTERNS = ("checks", "stripes")
CLASSES = sorted([*FORMS, *PATTERNS])


def ensure(cache: Path) -> Path:
    """The folder of the data set (ImageFolder layout, JPEG), drawn at first use, which takes seconds.

    Several processes may come at once: each draws under a name of its own, the first to finish renames, and all use
    that one.

    Raises:
        UsageError: the cache folder cannot be written.
    """
    folder = cache / f"shapes-{VERSION}"
    if folder.is_dir():
        return folder
    temporary = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
        temporary.chmod(0o755)
        write(temporary)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():
            raise UsageError(
                f"cannot write the default data set to '{folder}' ({error.strerror}): "
                f"give another data.cache, or a data.root"
            ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write(folder: Path) -> None:
    """Write ``COUNTS[split]`` images of every class as ``folder/split/class/0000.jpg``."""
    for split, count in COUNTS.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(draw(name, split, number))
                image.save(folder / split / name / f"{number:04d}.jpg", quality=92, subsampling=0)


def draw(name: str, split: str, number: int) -> np.ndarray:
    """One image, uint8 [SIDE, SIDE, 3]: a pure function of its arguments (Philox, keyed by them)."""
    stream = (list(COUNTS).index(split) * len(CLASSES) + CLASSES.index(name)) << 32 | number
    rng = np.random.Generator(np.random.Philox(key=np.array([_SEED, stream], np.uint64)))
    pixels = _background(rng)
    for cover in [_pattern(name, rng)] if name in PATTERNS else _scatter(FORMS[name], rng):
        around = (cover[..., None] * pixels).sum((0, 1)) / cover.sum()
        pixels += cover[..., None] * (_colour_away_from(around, rng) - pixels)
    return _photograph(pixels, rng)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A colour gradient [SIDE, SIDE, 3] in [0, 1], half of the time with a faint pattern."""
    first, second = rng.uniform(0.1, 0.9, (2, 3))
    ramp = _ramp(rng)[..., None]
    pixels = first + ramp * (second - first) * 0.6
    if rng.random() < 0.5:
        faint = _pattern(PATTERNS[rng.integers(len(PATTERNS))], rng) - 0.5
        pixels = pixels + faint[..., None] * rng.uniform(-0.15, 0.15, 3)
    return pixels.clip(0, 1)


def _scatter(form: tuple[Polygon, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Coverage maps [SIDE, SIDE] in [0, 1] of a few copies, apart from each other, each in a pose of its own."""
    placed: list[tuple[np.ndarray, float]] = []
    for _ in range(_TRIES):
        radius = SIDE * rng.uniform(0.13, 0.24)
        centre = rng.uniform(0.7 * radius, SIDE - 0.7 * radius, 2)
        if all(np.hypot(*(centre - other)) > radius + size for other, size in placed):
            placed.append((centre, radius))
    return [_cover(form, _pose(radius, rng), centre) for centre, radius in placed]


def _pose(radius: float, rng: np.random.Generator) -> np.ndarray:
    """A linear map [2, 2]: a rotation, a mild stretch along any axis, a size in pixels."""
    turn, axis = rng.uniform(0, 2 * np.pi, 2)
    stretch = _rotation(axis) @ np.diag([1.0, rng.uniform(0.75, 1.0)]) @ _rotation(-axis)
    return radius * stretch @ _rotation(turn)


def _cover(form: tuple[Polygon, ...], pose: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """How much of each pixel the posed form covers, [SIDE, SIDE] in [0, 1]."""
    mask = Image.new("L", (SIDE * _SUPERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    for polygon, ink in zip(form, (255, 0), strict=False):
        corners = (polygon @ pose.T + centre) * _SUPERSAMPLING
        pen.polygon(corners.ravel().tolist(), fill=ink)
    return np.asarray(mask.reduce(_SUPERSAMPLING), np.float64) / 255


def _pattern(name: str, rng: np.random.Generator) -> np.ndarray:
    """Stripes or checks [SIDE, SIDE] in [0, 1] of a random period, direction and phase, slightly bent."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 11)
    phases, bends = rng.uniform(0, 2 * np.pi, (2, 2))
    along, across = _rotation(angle) @ _GRID.reshape(2, -1)
    waves = [
        np.sin(2 * np.pi / period * (here + 1.5 * np.sin(there / 9 + bend)) + phase)
        for here, there, phase, bend in zip((along, across), (across, along), phases, bends, strict=True)
    ]
    wave = waves[0] if name == "stripes" else waves[0] * waves[1] * 2
    return (0.5 + 1.5 * wave).clip(0, 1).reshape(SIDE, SIDE)


def _colour_away_from(around: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random colour [3], tried until its brightness differs from the colour ``around``."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if abs((colour - around) @ _LUMA) > 0.25:
            return colour


def _photograph(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, then sensor noise: [SIDE, SIDE, 3] in [0, 1] -> uint8."""
    light = 1 + rng.uniform(0.0, 0.35) * (_ramp(rng)[..., None] - 0.5)
    noise = rng.normal(0, rng.uniform(0.005, 0.04), pixels.shape)
    return ((pixels * light + noise).clip(0, 1) * 255).round().astype(np.uint8)


def _ramp(rng: np.random.Generator) -> np.ndarray:
    """From 0 to 1 across the image in a random direction, [SIDE, SIDE]."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * _GRID[0] + np.sin(angle) * _GRID[1]
    return (ramp - ramp.min()) / np.ptp(ramp)


__all__ = ["CLASSES", "draw", "ensure", "write"]
