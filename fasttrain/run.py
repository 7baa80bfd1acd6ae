"""A run's folder: who holds it, what it was told, what it reports.

::

    <run.dir>/
      config.yaml         the resolved configuration of the last start
      lock                held while a run lives
      checkpoints/        step-00000500/ ..., latest
      metrics.jsonl       one JSON object a line: a training report or an evaluation, each with its step
      tensorboard/
      bad_images.txt      images that could not be shown, and why, where there are any
      not-finite-step-00000123/    what launch/replay.py needs to take that step again
      curves.png  encoder.safetensors  encoder.json       when the run ends
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from tqdm import tqdm

from fasttrain import distributed
from fasttrain.config import Config, to_yaml
from fasttrain.errors import UsageError
from fasttrain.watchdog import Watchdog

if TYPE_CHECKING:
    from fasttrain.data.damage import BadImages


class RunConfig(Config):
    """Where a run lives and how often it reports and saves."""

    dir: str = "runs/pretrain"
    "everything the run writes; a rerun with the same folder goes on from its last checkpoint"
    seed: int = Field(0, ge=0, lt=2**32)
    "of the weights, the order of samples and the augmentation"
    log_every: int = Field(10, ge=1)
    "steps between two reports"
    save_every: int = Field(500, ge=1)
    "steps between two checkpoints; before each evaluation there is one too"
    keep: int = Field(3, ge=1)
    "how many of the newest checkpoints stay"
    keep_every: int = Field(0, ge=0)
    "checkpoints of steps that are multiples of it stay for ever; a multiple of save_every, or 0: none"
    keep_best: str | None = Field(None, pattern=r"^(max|min):.+$")
    "max:<metric> or min:<metric> of an evaluation: the best checkpoint is made and stays, max:knn_top1 say"
    on_save_error: Literal["stop", "continue"] = "stop"
    "when a checkpoint cannot be written: stop, or go on and try again at the next, unless it was the last"
    heartbeat_timeout: float = Field(45.0, ge=0)
    "seconds without a sign of life of a rank after which the others end with code 76 and name it; 0: never"
    hang_timeout: float | None = Field(None, gt=0)
    "seconds without a step (evaluations included) after which the job ends with code 76; null: a line says so"

    @model_validator(mode="after")
    def _kept_are_made(self) -> RunConfig:
        if self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every={self.keep_every} is no multiple of save_every={self.save_every}: make it one"
            )
        return self

    @property
    def best_metric(self) -> str | None:
        """The metric that ``keep_best`` names."""
        return self.keep_best and self.keep_best[4:]

    @property
    def best_is_highest(self) -> bool:
        """Whether more of it is better."""
        return bool(self.keep_best) and self.keep_best.startswith("max:")


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
        self._silent, self._bad_images = False, 0
        distributed.on_rank_zero(self._hold)
        self.watchdog = Watchdog(config.heartbeat_timeout, config.hang_timeout)

    def _hold(self) -> None:
        """Lock the folder. The system lets go of the lock when its holder dies, however it dies.

        On NFS the lock holds across hosts (it becomes one on the server); where the file system has no locks, a line
        says so and nothing is held.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.dir / "lock", "a+")  # noqa: SIM115  (held for as long as the process lives)
        except OSError as error:
            raise UsageError(
                f"run.dir={self.config.dir} cannot be written ({error.filename}: {error.strerror}): choose another "
                "folder with run.dir=…"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise UsageError(
                f"run.dir={self.config.dir} is held by a live run ({self._lock.read().strip() or 'unknown'}): "
                "stop that run, or choose another folder with run.dir=…"
            ) from None
        except OSError as error:
            self.say(
                f"WARNING: run.dir={self.config.dir} is on a file system without locks ({error.strerror}): a second "
                "run in it would not be noticed"
            )
        with suppress(OSError):  # on a full disk the lock holds all the same
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()

    def open(self, config: Config, start: int, total: int) -> None:
        """Begin to report at step ``start`` of ``total``; what was reported beyond ``start`` is dropped.

        Raises:
            UsageError: the folder cannot be written; on all ranks.
        """
        self.watchdog.step = start
        distributed.on_rank_zero(lambda: self._open(config, start, total))

    def _open(self, config: Config, start: int, total: int) -> None:
        self._started, self._first = time.monotonic(), start
        self._total = total
        try:
            self._begin(config)
            self._open_metrics()
            self._open_tensorboard()
        except OSError as error:
            if self.config.on_save_error == "stop":
                raise UsageError(
                    f"run.dir={self.config.dir} cannot be written ({error}): free space or mend it"
                ) from None
            self._unwritten("the configuration and reports", error)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=total, unit="step", disable=not terminal, dynamic_ncols=True)

    def _begin(self, config: Config) -> None:
        path = self.dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= self._first] if self._first else []
        replace_file(self.dir / "config.yaml", to_yaml(config))
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _open_metrics(self) -> None:
        if self._metrics is None:
            self._metrics = (self.dir / "metrics.jsonl").open("a", buffering=1)

    def _open_tensorboard(self) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.dir / "tensorboard"), purge_step=self._first + 1)

    def progress(self, step: int) -> None:
        """``step`` steps are done: move the bar, and let the other ranks know."""
        self.watchdog.step = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics, to the file, to TensorBoard and to whoever watches; a full disk costs reports only."""
        if self._bar is None:
            return
        try:
            self._open_metrics()  # where the disk was full when the run began
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")
            self._open_tensorboard()  # after a line that went well: its thread cannot say that the disk is full
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._silent = False
        except OSError as error:
            self._unwritten(f"what step {step} reports", error)
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

    def list_bad_images(self, bad: BadImages) -> int:
        """Write what all ranks agree on to ``bad_images.txt``, and return how many there are."""
        if distributed.rank() == 0 and len(bad.found) != self._bad_images:
            try:
                replace_file(self.dir / "bad_images.txt", "".join(f"{complaint}\n" for complaint in bad.found.values()))
                self._bad_images = len(bad.found)
            except OSError as error:
                self._unwritten("the list of bad images", error)
        return len(bad.found)

    def _unwritten(self, what: str, error: OSError) -> None:
        """Said once, until a report can be written again."""
        if not self._silent:
            self.say(f"WARNING: {what} cannot be written to {self.dir} ({error})")
        self._silent = True

    def say(self, line: str) -> None:
        """A line for the person who watches, from rank 0, without breaking the bar."""
        if distributed.rank() == 0:
            with suppress(OSError):  # the terminal may be gone, and the run goes on
                tqdm.write(line, file=sys.stderr)
                sys.stderr.flush()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        """Flush the reports and let go of the folder; where a rank is lost, the process ends here and says which."""
        self.watchdog.leave(failure)
        for writer in (self._bar, self._tensorboard, self._metrics, self._lock):
            if writer is not None:
                with suppress(OSError):
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


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, where a kill on the way leaves what was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
