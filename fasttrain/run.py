"""A run's folder: who holds it, what it was told, what it reports.

::

    <run.dir>/
      config.yaml         the resolved configuration of the last start
      environment.json    each start: command, step, hosts, machines, versions, code; when it was done
      lock                held while a run lives
      checkpoints/        step-00000500/ ..., latest
      metrics.jsonl       one JSON object a line: a training report or an evaluation, each with its step
      tensorboard/        the same
      bad_images.txt      images that could not be shown, and why, where there are any
      not-finite-step-00000123/    what launch/replay.py needs to take that step again
      curves.png  encoder.safetensors  encoder.json       when the run ends

What is found there and cannot be read is renamed to ``….unreadable``, with a line; what can be read of it stays.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import socket
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from tqdm import tqdm

from fasttrain import distributed
from fasttrain.config import Config, PathText, to_yaml
from fasttrain.environment import environment, now
from fasttrain.errors import UsageError
from fasttrain.watchdog import Watchdog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fasttrain.data.damage import BadImages


FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "bad_images.txt",
    "curves.png",
    "encoder.safetensors",
    "encoder.json",
)


class RunConfig(Config):
    """Where a run lives and how often it reports and saves."""

    dir: PathText = "runs/pretrain"
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
        self._silent, self._bad_images, self._bad_before = False, 0, b""
        self._environment: dict[str, Any] = {}
        distributed.on_rank_zero(self._hold)
        self.watchdog = Watchdog(config.heartbeat_timeout, config.hang_timeout)

    def _hold(self) -> None:
        """Lock the folder. The system lets go of the lock when its holder dies, however it dies.

        On NFS the lock holds across hosts (it becomes one on the server); where the file system has no locks, a line
        says so and nothing is held.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            # held for as long as the process lives
            self._lock = open(self.dir / "lock", "a+", errors="replace")  # noqa: SIM115
        except OSError as error:
            raise UsageError(
                f"run.dir={self.config.dir} cannot be written ({error.filename}: {error.strerror}): choose another "
                "folder with run.dir=…"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = " ".join(self._lock.read(200).split())
            raise UsageError(
                f"run.dir={self.config.dir} is held by a live run ({holder or 'unknown'}): "
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
        self._environment = {**environment(), "step": start, "done": None, "earlier": []}
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
        """Put the folder in order: what was reported up to the step of the start stays."""
        for path in [self.dir / name for name in FILES]:
            if os.path.lexists(path) and not path.is_file():
                self._set_aside(path, "is no file")
        events = self.dir / "tensorboard"
        if os.path.lexists(events) and not events.is_dir():
            self._set_aside(events, "is no folder")
        metrics, bad, start = self.dir / "metrics.jsonl", self.dir / "bad_images.txt", self._first
        lines, complaints = _parse(metrics)
        if complaints:
            stay = f"; its other {len(lines):,} lines stay" if start else ""
            self._set_aside(metrics, f"has {len(complaints):,} lines that cannot be read ({complaints[0]}){stay}")
        replace_file(self.dir / "config.yaml", to_yaml(config))
        self._note(earlier=self._starts() if start else [])
        replace_file(metrics, "".join(_line(line) for line in lines if line["step"] <= start) if start else "")
        if start:
            self._bad_before = bad.read_bytes() if bad.exists() else b""
        else:
            bad.unlink(missing_ok=True)

    def _starts(self) -> list[dict[str, Any]]:
        """What ``environment.json`` says of the starts so far; where it cannot be read it is set aside."""
        path = self.dir / "environment.json"
        try:
            last = json.loads(path.read_text())
            starts = [*last.pop("earlier"), last]
            if all(isinstance(start, dict) for start in starts):
                return starts
        except FileNotFoundError:
            return []
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            pass
        self._set_aside(path, "cannot be read")
        return []

    def _note(self, **more: Any) -> None:
        """Write ``environment.json``, with ``more`` than it said."""
        self._environment |= more
        replace_file(self.dir / "environment.json", json.dumps(self._environment, indent=1) + "\n")

    def done(self) -> None:
        """All is there that the run was for: say so, and when, in ``environment.json``."""
        try:
            self._note(done=now())
        except OSError as error:
            self._unwritten("that the run is done", error)

    def _open_metrics(self) -> None:
        if self._metrics is None:
            self._metrics = (self.dir / "metrics.jsonl").open("a", buffering=1)

    def _open_tensorboard(self) -> None:
        """What an earlier life reported beyond the start, and where it saved nothing all of it, is not shown twice."""
        if self._tensorboard is None:
            self._tensorboard = _tensorboard_writer(self.dir / "tensorboard", self._first + 1 if self._first else 0)

    def _set_aside(self, path: Path, why: str) -> None:
        """Rename what cannot be read: it is in nobody's way, and not lost."""
        names = (f"{path.name}.unreadable{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
        aside = next(place for place in map(path.with_name, names) if not os.path.lexists(place))
        path.rename(aside)
        self.say(f"WARNING: {path} {why}: what was there is now {aside.name}")

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
            self._metrics.write(_line({"step": step, **values}))
            self._open_tensorboard()  # after a line that went well: its thread cannot say that the disk is full
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()  # a kill leaves the two alike
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
        """Add what all ranks agree on to ``bad_images.txt``, and return how many there are."""
        if distributed.rank() == 0 and len(bad.found) != self._bad_images:
            try:
                found = (complaint.encode(errors="backslashreplace") + b"\n" for complaint in bad.found.values())
                known = set(self._bad_before.splitlines(keepends=True))
                new = b"".join(line for line in found if line not in known)
                replace_file(self.dir / "bad_images.txt", self._bad_before + new)
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
        """A line for the person who watches, from rank 0, without breaking the bar; whatever names are in it."""
        distributed.say(line)

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
    """The lines of a ``metrics.jsonl`` that can be read; a value that was not finite is NaN."""
    try:
        return _parse(path)[0]
    except OSError:
        return []


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines, and what is wrong with each of the others; a last line that a crash cut short is neither."""
    *whole, cut = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    lines, complaints = [], []
    for number, raw in enumerate(whole, 1):
        line = _read_line(raw)
        if isinstance(line, dict):
            lines.append(line)
        elif raw.strip():
            complaints.append(f"line {number} {line}")
    line = _read_line(cut)
    if isinstance(line, dict):
        lines.append(line)
    elif cut.strip() and not (cut.startswith(b"{") and "JSON" in line):
        complaints.append(f"line {len(whole) + 1} {line}")
    return lines, complaints


def _read_line(raw: bytes) -> dict[str, Any] | str:
    """A line of ``metrics.jsonl``, or why it is none."""
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError):
        return "is not JSON"
    step = line.get("step") if isinstance(line, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        return "is no object with a step"
    values = {name: math.nan if value is None else value for name, value in line.items()}
    return values if all(map(is_number, values.values())) else "has a value that is no number"


def _line(values: dict[str, Any]) -> str:
    """JSON, which knows no NaN and no infinity: they become null."""
    plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def is_number(value: Any) -> bool:
    """Whether a value from a file can be reckoned with: NaN can; true, and what exceeds a float, cannot."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, where a failure or a kill on the way leaves what was there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _tensorboard_writer(folder: Path, purge_step: int) -> SummaryWriter:
    """TensorBoard cannot write to a name that is not UTF-8; the system has another one of every open folder."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        str(folder).encode()
        return SummaryWriter(str(folder), purge_step=purge_step)
    except UnicodeEncodeError:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        writer = SummaryWriter(f"/proc/self/fd/{descriptor}", purge_step=purge_step)
        weakref.finalize(writer, os.close, descriptor)
        return writer


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
