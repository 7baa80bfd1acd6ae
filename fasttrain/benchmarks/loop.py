"""The real training loop, watched from where its batches come."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasttrain import engine
from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.data.damage import BadImages
from fasttrain.data.loader import Loader
from fasttrain.optim import OptimizerConfig
from fasttrain.run import Run, RunConfig, read_metrics
from fasttrain.step import TrainStep

Script = Callable[["Watched"], Iterator[int]]
"""What is done beside the loop: each number that it yields is how many steps are taken until it goes on. What it does
falls between two steps. The loop ends with it."""

STEADY = engine.Plan(2**31, 2**31, lambda step: 0.01)
"A plan without an end, at one learning rate."


class LoopConfig(Config):
    """What the loop reads of a training script's settings."""

    train: engine.TrainConfig = engine.TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class Ran(NamedTuple):
    """What a run of the loop reported."""

    metrics: list[dict[str, float]]
    said: list[str]


class _Silent(Run):
    """It reports to its file alone, and keeps what it would say."""

    def __init__(self, config: RunConfig) -> None:
        self.said: list[str] = []
        super().__init__(config)

    def say(self, line: str) -> None:
        self.said.append(line)


class Enough(Exception):
    """The script has ended, and so does the loop; nothing is saved."""


class Repeated:
    """A :class:`Loader` of one batch, again and again, which already lies on the device."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.bad = batch, BadImages(0.0, len(batch.labels), "")

    def __len__(self) -> int:
        return 1

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self.batch)

    def close(self) -> None: ...


class Watched:
    """A :class:`Loader` that goes by a script, and tells how long its batches were waited for.

    Args:
        accumulation: micro-batches a step.
    """

    last: Batch

    def __init__(self, loader: Loader, script: Script, accumulation: int = 1) -> None:
        self._loader, self._script, self._accumulation = loader, script, accumulation
        self.bad, self.waited = loader.bad, 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        batches = self._loader.iterate(start)
        for steps in self._script(self):
            for _ in range(steps * self._accumulation):
                began = time.perf_counter()
                self.last = next(batches)
                self.waited += time.perf_counter() - began
                yield self.last
        raise Enough

    def close(self) -> None:
        self._loader.close()


def run_loop(
    module: TrainStep, config: Any, loader: Loader, script: Script, device: torch.device, log_every: int = 2**31
) -> Ran:
    """``engine.fit`` as a training script calls it, in a folder of its own, until ``script`` ends; what it reported.

    The loader is left open. ``module`` is trained, and DeepSpeed leaves hooks on it: give a copy.

    Args:
        config: with the sections ``train`` and ``optimizer``.
    """
    watched = Watched(loader, script, config.train.accumulation)
    with tempfile.TemporaryDirectory() as folder:
        with _Silent(RunConfig(dir=folder, log_every=log_every)) as run, suppress(Enough):
            engine.fit(module, config, STEADY, watched, "a benchmark", run, device)
        found = Ran(read_metrics(Path(folder) / "metrics.jsonl"), run.said)
    gc.collect()  # DeepSpeed's engine refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def wait_for(device: torch.device) -> None:
    """Until all is done that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["Enough", "LoopConfig", "Ran", "Repeated", "Script", "Watched", "run_loop", "wait_for"]
