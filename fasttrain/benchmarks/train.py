"""The real training loop from real files, against its own forward and backward, and against its loader, alone."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fasttrain.benchmarks.loop import Repeated, Watched, run_loop, wait_for
from fasttrain.benchmarks.profile import Profile, Profiler
from fasttrain.benchmarks.timing import Report
from fasttrain.data import Batch
from fasttrain.data.loader import Loader
from fasttrain.optim import build_optimizer
from fasttrain.precision import autocast_dtype
from fasttrain.step import TrainStep

LOOP, FED = "the loop", "the loop on a batch that lies there"
CEILING, LOADER = "forward, backward and optimiser alone", "the loader alone"
PROFILED = 5
"steps of which launches are counted, at most"


class Window(NamedTuple):
    """A stretch of steps."""

    seconds: float  # a step
    waited: float  # of those, for data


def compare_train(
    config: Any, steps: int, rounds: int, module: TrainStep, loader: Loader, device: torch.device
) -> Iterator[Report]:
    """Images a second of the loop, and how near that is to what its parts would allow.

    The loop once more, on one batch again and again that already lies on the device, waits for no loader. A plain
    PyTorch step of the same module on that batch has none of the loop's bookkeeping, and no CUDA graph. They and the
    loader take turns, each in windows of ``steps`` steps after as many to warm up. Yields after every round.

    Args:
        config: with the sections ``train`` and ``optimizer``.
    """
    windows: dict[str, list[Window]] = {LOOP: [], FED: [], CEILING: [], LOADER: []}
    profiles: dict[str, Profile] = {}

    def loop(name: str, source: Loader) -> Batch:
        """A window of the loop on what ``source`` gives; the last batch of it."""

        def script(watched: Watched) -> Iterator[int]:
            yield steps
            wait_for(device)
            began, waited = time.perf_counter(), watched.waited
            yield steps
            wait_for(device)
            windows[name].append(Window((time.perf_counter() - began) / steps, (watched.waited - waited) / steps))
            if name not in profiles:
                profiler, count = Profiler(device), min(steps, PROFILED)
                yield count
                wait_for(device)
                profiles[name] = profiler.stop(count)
            seen[:] = [watched.last]

        seen: list[Batch] = []
        run_loop(copy.deepcopy(module), config, source, script, device)
        return seen[0]

    for _ in range(rounds):
        batch = loop(LOOP, loader)
        loop(FED, Repeated(batch))
        step = plain_step(copy.deepcopy(module), config, batch, device)
        windows[CEILING].append(timed(step, steps, device))
        if CEILING not in profiles:
            profiler = Profiler(device)
            step()
            wait_for(device)
            profiles[CEILING] = profiler.stop(1)
        windows[LOADER].append(timed(partial(_fetch, loader.iterate(), config.train.accumulation), steps, device))
        yield report(config.train.batch, windows, profiles)
    loader.close()


def plain_step(module: TrainStep, config: Any, batch: Batch, device: torch.device) -> Callable[[], None]:
    """Forward, backward and optimiser of ``accumulation`` micro-batches, as one would write them."""
    module = module.train().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optimizer, module, 0, device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    dtype, accumulation = autocast_dtype(config.train.precision), config.train.accumulation

    def step() -> None:
        for _ in range(accumulation):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss, _ = module(batch)
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _fetch(batches: Iterator[Batch], count: int) -> None:
    for _ in range(count):
        next(batches)


def timed(step: Callable[[], object], steps: int, device: torch.device) -> Window:
    """A window after a warm-up as long."""
    for _ in range(2):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
    return Window((time.perf_counter() - began) / steps, 0.0)


def report(images: int, windows: dict[str, list[Window]], profiles: dict[str, Profile]) -> Report:
    """Of steps of ``images`` images."""
    seconds = {name: statistics.median(window.seconds for window in found) for name, found in windows.items()}
    rates = {name: images / taken for name, taken in seconds.items()}
    lines = [
        "| what | images/s, median | least to greatest | ms a step | waits for data | launches | device busy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name, found in windows.items():
        every = [images / window.seconds for window in found]
        waits = statistics.median(window.waited / window.seconds for window in found) if name == LOOP else None
        profile = profiles.get(name)
        busy = profile.busy / seconds[name] if profile else None
        lines.append(
            f"| {name} | {rates[name]:,.1f} | {min(every):,.1f} to {max(every):,.1f} | {1000 * seconds[name]:,.1f} "
            f"| {'' if waits is None else f'{waits:.1%}'} | {f'{profile.launches:,.0f}' if profile else ''} "
            f"| {'' if busy is None else f'{busy:.0%}'} |"
        )
        details = {} if profile is None else profile._asdict()
        rows.append(
            {"name": name, "windows": [window._asdict() for window in found], "seconds": seconds[name]}
            | {"images_per_second": rates[name], "data_wait": waits, "busy_share": busy}
            | details
        )
    shares = [f"{rates[LOOP] / rates[name]:.0%} of {name}" for name in (FED, CEILING, LOADER)]
    lines += ["", f"- {LOOP} reaches {', '.join(shares)}"]
    return Report("\n".join(lines), rows, rates, "images/s")


__all__ = ["compare_train", "plain_step"]
