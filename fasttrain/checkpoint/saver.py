"""Checkpoints of a run that goes on meanwhile."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch

import fasttrain
from fasttrain import distributed
from fasttrain.checkpoint import files, retention
from fasttrain.checkpoint.state import Snapshot, snapshot
from fasttrain.errors import UsageError
from fasttrain.run import Run


class Saver:
    """Writes a run's checkpoints, one at a time, in rank 0's background.

    What all ranks do together is the copy to rank 0's host; the rest is one thread's work and uses no collective, so a
    write can neither race with training's collectives nor leave a rank in one. What goes wrong in it is said at once;
    where the run is to stop for it, it is :attr:`failed` on rank 0, which the ranks agree on at the next step boundary.

    Args:
        facts: further JSON values of a checkpoint at the moment of :meth:`save`, among them ``config``.
    """

    def __init__(self, run: Run, engine, facts: Callable[[], dict[str, Any]]) -> None:
        self._run, self._engine, self._facts = run, engine, facts
        self._writer: threading.Thread | None = None
        self._failure: str | None = None
        self._timings: dict[str, float] = {}
        distributed.on_rank_zero(lambda: files.sweep(run.checkpoints))

    @property
    def failed(self) -> bool:
        """On rank 0, whether the last checkpoint could not be written and ``run.on_save_error`` says to stop then."""
        return self._failure is not None and self._run.config.on_save_error == "stop"

    def save(self, step: int) -> None:
        """Copy the state of ``step`` and begin to write it; all ranks together. Waits for the previous one's end."""
        began = time.perf_counter()
        self._join()
        taken = snapshot(self._engine)
        if taken is not None:
            self._writer = threading.Thread(
                target=self._write, args=(step, taken, self._facts()), name="fasttrain-saver"
            )
            self._writer.start()
        self._timings["save_stall_seconds"] = time.perf_counter() - began

    def mark(self, step: int, metrics: dict[str, float]) -> None:
        """Note beside the checkpoint of ``step`` what evaluations found there; ``run.keep_best`` chooses by it."""
        if distributed.rank() != 0:
            return
        self._join()
        try:
            retention.mark(self._run.checkpoints, step, metrics, self._run.config)
        except OSError as error:
            self._run.say(f"WARNING: the metrics of the checkpoint of step {step} cannot be written ({error})")

    def stop_if_failed(self) -> None:
        """On all ranks together, where the last checkpoint could not be written.

        Raises:
            UsageError: which, and why.
        """
        message = distributed.on_rank_zero(lambda: self._failure)
        if message is not None:
            raise UsageError(
                f"{message}: free space or mend the folder and run the same command again; the previous checkpoint "
                "is untouched",
                everywhere=True,
            )

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk; all ranks together.

        Raises:
            UsageError: it cannot be written, whatever ``run.on_save_error`` says: there is no next one to try.
        """
        self._join()
        self.stop_if_failed()

    def timings(self) -> dict[str, float]:
        """Since last asked: ``save_stall_seconds`` that training waited, ``save_seconds`` until on the disk."""
        timings, self._timings = self._timings, {}
        return timings

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, step: int, taken: Snapshot, facts: dict[str, Any]) -> None:
        began, folder = time.perf_counter(), self._run.checkpoints
        try:
            path = files.write(folder, step, _contents(step, taken, facts))
            if damage := files.verify(path):
                raise OSError(f"it reads back damaged: {damage}")
            retention.prune(folder, path, self._run.config)
            self._failure = None
        except Exception as error:  # whatever it is, training must hear of it
            self._failure = f"the checkpoint of step {step} cannot be written to {folder} ({error})"
            self._run.say(f"WARNING: {self._failure}; the previous checkpoint is untouched")
        self._timings["save_seconds"] = time.perf_counter() - began


def _contents(step: int, taken: Snapshot, facts: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    taken.wait()
    record = {
        **facts,
        "format": files.FORMAT,
        "step": step,
        "world_size": distributed.world_size(),
        "optimizer_scalars": taken.scalars,
        "versions": versions(),
    }
    yield files.STATE, json.dumps(record, indent=1).encode()
    yield files.MODEL, safetensors.torch.save(taken.model)
    yield files.OPTIMIZER, safetensors.torch.save(taken.optimizer)
    yield files.RANKS, safetensors.torch.save(taken.ranks)


def versions() -> dict[str, str]:
    """Versions that a run depends on."""
    import deepspeed

    return {
        "fasttrain": fasttrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
