"""What changing colours on the device takes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from fasttrain.benchmarks.loop import wait_for
from fasttrain.benchmarks.truth.row import Row
from fasttrain.data import colour
from fasttrain.data.augment import AugmentConfig, SimCLR

CASES = [
    (256, AugmentConfig()),
    (256, AugmentConfig(blur=0)),
    (512, AugmentConfig(size=32, jitter=0.5, blur=0)),
]
REPEATS = 5


def colours(device: torch.device) -> Iterator[Row]:
    """Microseconds a view of the batched operations, and launches of a batch of views."""
    for images, config in CASES:
        if device.type == "cpu":
            images, config = 4, config.model_copy(update={"size": 16})
        pixels = torch.randint(0, 256, (images, config.size, config.size, 3), dtype=torch.uint8, device=device)
        draws = SimCLR(config, 0).draw(0, np.arange(images), np.full((images, 2), 2 * config.size))
        view = draws.take((slice(None), 0))
        colour.apply_torch(pixels, view)
        wait_for(device)
        began = time.perf_counter()
        for _ in range(REPEATS):
            colour.apply_torch(pixels, view)
        wait_for(device)
        seconds = (time.perf_counter() - began) / REPEATS / images
        name = f"{config.size} pixels, {'with' if config.blur else 'without'} blur, {images} views"
        yield Row(name, f"{1e6 * seconds:.1f} us a view", None, {"seconds_a_view": seconds})


__all__ = ["colours"]
