"""Random JPEG files, for loaders to read: ``python -m fasttrain.benchmarks.pictures FOLDER COUNT HEIGHT WIDTH``."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
CELL = 16
"Pixels between which a picture is smooth, so that it takes as many bytes as a photograph."
GRAIN = 10


def write_pictures(folder: Path, count: int, height: int, width: int) -> None:
    """``folder/train/<class>/<number>.jpg``, each a function of its number; what is there already stays."""

    def write(number: int) -> None:
        path = folder / "train" / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        if path.exists():
            return
        draw = np.random.default_rng(number)
        cells = draw.integers(0, 256, (height // CELL + 1, width // CELL + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = draw.integers(-GRAIN, GRAIN, (height, width, 3), dtype=np.int16)
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)

    for label in range(CLASSES):
        (folder / "train" / f"class{label}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(count)))


if __name__ == "__main__":
    write_pictures(Path(sys.argv[1]), *map(int, sys.argv[2:]))


__all__ = ["write_pictures"]
