"""A run's folder: who holds it, what it was told, what it reports.

::

    <run.dir>/
      config.yaml         the resolved configuration of the last start
      lock                held while a run lives
      checkpoints/        step-00000500/ ..., latest
      metrics.jsonl       one JSON object a line: a training report or an evaluation, each with its step
      tensorboard/
      curves.png  encoder.safetensors  encoder.json       when the run ends
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from fasttrain import distributed
from fasttrain.config import Config, to_yaml
from fasttrain.errors import UsageError


class RunConfig(Config):
    """Where a run lives and how often it reports and saves."""

    dir: str = "runs/pretrain"
    "everything the run writes; a rerun with the same folder goes on from its last checkpoint"
    seed: int = Field(0, ge=0, lt=2**32)
    "of the weights, the order of samples and the augmentation"
    log_every: int = Field(10, ge=1)
    "steps between two reports"
    save_every: int = Field(500, ge=1)
    "steps between two checkpoints"
    keep: int = Field(3, ge=1)
    "how many of the newest checkpoints stay"


class Run:
    """The folder, held by this job alone; only rank 0 writes reports into it.

    Raises:
        UsageError: the folder cannot be written, or another live run holds it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.dir = Path(config.dir)
        self.checkpoints = self.dir / "checkpoints"
        self._lock = self._metrics = self._tensorboard = self._bar = None
        distributed.on_rank_zero(self._hold)

    def _hold(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.dir / "lock", "a+")  # noqa: SIM115  (held for as long as the process lives)
        except OSError as error:
            raise UsageError(
                f"run.dir={self.config.dir} cannot be written ({error.strerror}): choose another folder with run.dir=…"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise UsageError(
                f"run.dir={self.config.dir} is held by a live run ({self._lock.read().strip() or 'unknown'}): "
                "stop that run, or choose another folder with run.dir=…"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def open(self, config: Config, start: int, total: int) -> None:
        """Begin to report at step ``start`` of ``total``; what was reported beyond ``start`` is dropped."""
        if distributed.rank() != 0:
            return
        (self.dir / "config.yaml").write_text(to_yaml(config))
        path = self.dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= start] if start else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = path.open("a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(self.dir / "tensorboard"), purge_step=start + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=total, unit="step", disable=not terminal, dynamic_ncols=True)
        self._started, self._first = time.monotonic(), start
        self._total = total

    def progress(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics, to the file, to TensorBoard and to whoever watches."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar.disable:
            self.say(f"step {step}/{self._total}  {text}{self._time_left(step)}")
        elif "loss" in values:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}  {text}")

    def _time_left(self, step: int) -> str:
        if not self._first < step < self._total:
            return ""
        seconds = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
        return (
            time.strftime("  left %H:%M:%S", time.gmtime(seconds))
            if seconds < 86400
            else f"  left {seconds / 3600:.0f} h"
        )

    def say(self, line: str) -> None:
        """A line for the person who watches, from rank 0, without breaking the bar."""
        if distributed.rank() == 0:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *failure: object) -> None:
        """Flush the reports and let go of the folder."""
        for writer in (self._bar, self._tensorboard, self._metrics, self._lock):
            if writer is not None:
                writer.close()
        self._lock = self._metrics = self._tensorboard = self._bar = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
