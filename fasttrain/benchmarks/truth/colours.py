"""What making views on the device takes: whole, and their colours alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from fasttrain.benchmarks.cases.augment import views_to_make
from fasttrain.benchmarks.loop import wait_for
from fasttrain.benchmarks.profile import Profiler
from fasttrain.benchmarks.truth.row import Row
from fasttrain.data.augment import AugmentConfig
from fasttrain_kernels.augment.batched import augment_batched
from fasttrain_kernels.augment.gpu import augment_gpu

CASES = [
    (256, (375, 500), AugmentConfig()),
    (256, (375, 500), AugmentConfig(blur=0)),
    (512, (32, 32), AugmentConfig(size=32, jitter=0.5, blur=0)),
]
FORMS = {"ours": augment_gpu, "batched operations": augment_batched}
REPEATS = 10


def colours(device: torch.device) -> Iterator[Row]:
    """Microseconds a view, launches of a batch, images a second whose views are made."""
    for images, source, config in CASES:
        if device.type == "cpu":
            images, source, config = 4, (20, 30), config.model_copy(update={"size": 16})
        views = views_to_make(images, source, config, device)
        levels = views.made(augment_gpu, torch.uint8)
        out = torch.empty(levels.shape, device=device)
        given = {
            "from images": (views.pixels, views.starts, views.sizes, views.table, out),
            "colours alone": (levels, None, None, views.table, out),
        }
        name = f"{config.size} pixels, {'with' if config.blur else 'without'} blur, {images} images"
        for what, arguments in given.items():
            for form, augment in FORMS.items():
                seconds, launches = _measured(lambda run=augment, given=arguments: run(*given), device)
                rate, seconds = images / seconds, seconds / images / config.views
                says = f"{1e6 * seconds:.2f} us a view, {launches:.0f} launches, {rate:,.0f} images/s"
                data = {"seconds_a_view": seconds, "launches": launches, "images_per_second": rate}
                yield Row(f"{name}, {config.views} views, {what}, {form}", says, None, data)


def _measured(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds and launches of a call, after a first."""
    repeats = REPEATS if device.type == "cuda" else 1
    run()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    wait_for(device)
    seconds = (time.perf_counter() - began) / repeats
    profiler = Profiler(device)
    run()
    wait_for(device)
    return seconds, profiler.stop(1).launches


__all__ = ["colours"]
