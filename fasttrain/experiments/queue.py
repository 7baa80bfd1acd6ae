"""Jobs are run one after the other: what is done is passed over, what fails is named, the others go on."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.experiments.commands import Job, Plan
from fasttrain.experiments.results import is_done
from fasttrain.printable import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SENT_ON = {signal.SIGUSR1: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"As what, where not as it came: launchers know these."
PR_SET_PDEATHSIG = 1

COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Outcome(NamedTuple):
    """Of a job: done, failed, or missing, because of what it needs or since nobody ran it."""

    state: str
    seconds: float | None = None
    why: str | None = None


def outcomes(plan: Plan) -> dict[str, Outcome]:
    """What is done already, and what is not."""
    return {name: Outcome("done" if is_done(job, plan.jobs) else "missing") for name, job in plan.jobs.items()}


def ready(plan: Plan) -> list[Job]:
    """What is not done and can run now, since all that it needs is done."""
    found = outcomes(plan)
    return [
        job
        for name, job in plan.jobs.items()
        if found[name].state == "missing" and all(found[other].state == "done" for other in job.needs)
    ]


class Queue:
    """Runs what is not done, one after the other.

    Args:
        say: is told a line when a job begins, and when it ends.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> dict[str, Outcome]:
        """All of it; where a signal ends it, what was under way has saved itself and the same command goes on."""
        found = outcomes(self.plan)
        if before := sum(outcome.state == "done" for outcome in found.values()):
            self.say(f"{before} of {len(found)} are done")
        began, ran = time.monotonic(), 0
        with self._heeding_signals():
            for number, (name, job) in enumerate(self.plan.jobs.items(), 1):
                if self.stopped:
                    break
                if is_done(job, self.plan.jobs):
                    continue
                lacking = [other for other in job.needs if found[other].state != "done"]
                if lacking:
                    found[name] = Outcome("missing", why=f"needs {', '.join(lacking)}")
                    continue
                self.say(f"[{number}/{len(found)}] {name}{self._left(began, ran, found)}")
                found[name] = self._run(job)
                ran += 1
                if found[name].state == "failed" and not self.stopped:
                    self.say(f"    failed: {found[name].why}; its log: {printable(str(self.log_of(job)))}")
        return found

    def log_of(self, job: Job) -> Path:
        """Where what it says goes."""
        return self.plan.folder / "logs" / f"{job.name}.log"

    def _left(self, began: float, ran: int, found: dict[str, Outcome]) -> str:
        if not ran:
            return ""
        waiting = sum(outcome.state == "missing" for outcome in found.values())
        minutes = (time.monotonic() - began) / ran * waiting / 60
        return f"  (about {minutes:.0f} min left)" if minutes >= 1 else ""

    def _run(self, job: Job) -> Outcome:
        log = self.log_of(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            file.write(f"$ {job.line}\n".encode(errors="backslashreplace"))
            file.flush()
            try:
                self._child = subprocess.Popen(
                    job.words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a signal reaches it from here, once
                    preexec_fn=_end_with_parent,
                )
            except OSError as error:
                return Outcome("failed", 0.0, f"{job.words[0]}: {error.strerror}")
            if self.stopped:  # by a signal that came just before
                self._child.terminate()
            last = error = ""
            for line in self._child.stdout or ():
                file.write(line)
                file.flush()
                text = COLOUR.sub("", line.decode(errors="replace")).strip()
                last, error = text or last, text if text.startswith("error: ") else error
                _show(text)
            code = self._child.wait()
            self._child = None
        _show("")
        seconds = round(time.monotonic() - began, 1)
        if code == 0 and is_done(job, self.plan.jobs):
            return Outcome("done", seconds)
        if code == 0:
            return Outcome("failed", seconds, f"it ended well and left no {job.result.name} of this command")
        return Outcome(
            "missing" if self.stopped else "failed", seconds, f"code {code}, {printable((error or last)[:300])}"
        )

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """What ends this goes on to all processes of what is under way, which save themselves."""

        def heed(number: int, _: Any) -> None:
            self.stopped = True
            if self._child is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self._child.pid, SENT_ON.get(signal.Signals(number), number))

        before = {number: signal.signal(number, heed) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_parent() -> None:
    """In the child, before it becomes another program: have the kernel send SIGTERM when the parent is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _show(line: str) -> None:
    """The last line of what runs, in one place of the terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 5
        sys.stderr.write(f"\r\x1b[K{'    ' + printable(line[:width]) if line else ''}")
        sys.stderr.flush()


__all__ = ["Outcome", "Queue", "outcomes", "ready"]
