"""All that is to be known of a machine with a GPU, by one command: parts, each a process with a limit of its own.

What a part prints goes to the terminal and to ``<part>.log``; its own results, where it is a benchmark, to
``<part>.json`` and ``.md``, as they come. A part that fails, or is cut short, takes no other with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field

import fasttrain
import fasttrain_kernels
from fasttrain.benchmarks.timing import Report
from fasttrain.config import Config

PartName = Literal["facts", "tests", "truth", "steps", "train", "loaders", "step", "kernels", "attack"]
HOME = Path(fasttrain.__file__).parent.parent
LAST = 15
"lines of a failed part that are shown"
PATIENCE = 5.0
"seconds between SIGTERM and SIGKILL"
LEAST = 10.0
"seconds with which a part is still begun"
CHOSEN = [
    "tests/gpu",
    "tests/test_ntxent_triton.py",
    "tests/test_batchnorm_kernels.py",
    "tests/test_apgd_step.py",
    "tests/test_augment_triton.py",
    "tests/test_attacks.py",
    "tests/test_colour.py",
    "tests/test_dali.py",
]
"Files with tests that need a GPU, by these words of their names: interpreted kernels are a CPU's."
WORDS = "(triton and not interpret) or gpu or cuda or ntxent"


class GpuBenchConfig(Config):
    """Which parts, in what time."""

    parts: tuple[PartName, ...] = get_args(PartName)
    "which, in this order; each ends at its own limit"
    minutes: float = Field(8.0, gt=0)
    "of all parts together"


class Part(NamedTuple):
    """Commands that are run one after the other."""

    seconds: float  # at most
    commands: list[list[str]]
    results: tuple[str, ...] = ()  # names of the files, without their suffixes, that they leave
    lacking: str = ""  # why it cannot be run here


class Ended(NamedTuple):
    """A part."""

    name: PartName
    status: str  # "passed", why it was not run, or how it failed
    seconds: float
    last: list[str]  # lines, of one that failed
    passed: bool | None  # None where it was not run


def run_parts(config: GpuBenchConfig, rounds: int, tiny: bool, folder: Path, script: Path) -> Iterator[Report]:
    """Every part's end, with the last lines of those that failed, and all that the parts found.

    Args:
        tiny: the sizes of a CPU.
        folder: of logs and results.
        script: launch/bench.py.
    """
    deadline = time.monotonic() + 60 * config.minutes
    ended: list[Ended] = []
    with interruptible(), tempfile.TemporaryDirectory() as pictures:
        parts = parts_of(rounds, tiny, folder, script, Path(pictures))
        for name in config.parts:
            part, left = parts[name], deadline - time.monotonic()
            if part.lacking or left < LEAST:
                ended.append(Ended(name, part.lacking or "no time left", 0.0, [], None if part.lacking else False))
            else:
                ended.append(run_part(name, part, min(part.seconds, left), folder))
            yield report(ended, parts, folder)


def parts_of(rounds: int, tiny: bool, folder: Path, script: Path, pictures: Path) -> dict[PartName, Part]:
    """What each part runs; ``pictures`` is where those for the loaders go."""

    def bench(task: str, *arguments: str, result: str = "") -> list[str]:
        common = [f"rounds={rounds}", f"output={folder / (result or task)}.json", *["quick=true"] * tiny]
        return [sys.executable, str(script), task, *arguments, *common]

    def truth(name: str, *sections: str) -> list[str]:
        return bench("truth", f"sections=[{','.join(sections)}]", result=name)

    def drawn(side: int, count: int, height: int, width: int) -> list[str]:
        sizes = map(str, (count, height, width))
        return [sys.executable, "-m", "fasttrain.benchmarks.pictures", str(pictures / str(side)), *sizes]

    def loader(side: int, *arguments: str) -> list[str]:
        given = [f"data.root={pictures / str(side)}", "peers=[kornia,dali]", *arguments]
        given += [] if tiny else ["batches=16"]
        return bench("loader", *given, result=f"loader{side}")

    cifar = ["augment.size=32", "augment.jitter=0.5", "augment.blur=0", *([] if tiny else ["batch=512"])]
    loaders = [
        drawn(224, 16 if tiny else 2048, 393, 464),
        loader(224),
        drawn(32, 16 if tiny else 8192, 32, 32),
        loader(32, *cifar),
    ]
    recipe = HOME / "configs/pretrain/simclr_cifar10.yaml"
    large = [str(recipe)] if recipe.exists() and not tiny else []
    batch = [] if tiny else ["batch=256"]
    dali = "" if find_spec("nvidia") and find_spec("nvidia.dali") else "DALI is not installed"
    untested = "" if (HOME / "tests/gpu").is_dir() else "there are no tests beside the package"
    untested = untested or ("" if find_spec("pytest") else "pytest is not installed")
    return {
        "facts": Part(40, [truth("facts", "facts")], ("facts",)),
        "tests": Part(110, [tests(tiny)], (), untested),
        "truth": Part(120, [truth("truth", "kernels", "waits", "colours", "modes")], ("truth",)),
        "steps": Part(120, [truth("steps", "steps", "graph")], ("steps",)),
        "train": Part(60, [bench("train", *large)], ("train",), dali),
        "loaders": Part(90, loaders, ("loader224", "loader32"), dali),
        "step": Part(70, [bench("step", *batch)], ("step",)),
        "kernels": Part(90, [bench("kernels", *([] if tiny else ["images=8192"]))], ("kernels",)),
        "attack": Part(80, [bench("attack", *batch)], ("attack",)),
    }


def tests(tiny: bool) -> list[str]:
    """Those that need a GPU; without one, that they can be collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(HOME)]
    if tiny:
        return [*command, str(HOME / "tests/gpu")]
    command += ["-n", "8"] if find_spec("xdist") else []
    return [*command, *(str(HOME / place) for place in CHOSEN), "-k", WORDS]


def run_part(name: PartName, part: Part, limit: float, folder: Path) -> Ended:
    """Its commands up to the first that fails; what they print goes to the terminal and to a file."""
    for result in part.results:  # of an earlier run
        for suffix in (".json", ".md"):
            (folder / result).with_suffix(suffix).unlink(missing_ok=True)
    began, last, status = time.monotonic(), deque[str](maxlen=LAST), "passed"
    _say(f"== {name}: at most {limit:.0f} s")
    with (folder / f"{name}.log").open("w") as log:

        def tell(line: str) -> None:
            log.write(line)
            log.flush()
            last.append(line.rstrip("\n"))
            _say(f"{name}: {last[-1]}")

        for command in part.commands:
            code = run(command, limit - (time.monotonic() - began), tell)
            if code != 0:
                status = f"did not end within {limit:.0f} s" if code is None else f"failed with code {code}"
                break
    seconds = time.monotonic() - began
    _say(f"== {name}: {status}, {seconds:.0f} s")
    return Ended(name, status, seconds, [] if status == "passed" else list(last), status == "passed")


def run(command: list[str], seconds: float, tell: Callable[[str], None]) -> int | None:
    """The exit code of ``command``, None where it was ended after ``seconds``; every line that it prints is told.

    Nothing that it started is left behind.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    cut = threading.Event()
    timer = threading.Timer(max(seconds, 0), lambda: (cut.set(), end(process)))
    timer.start()
    try:
        for line in process.stdout:
            tell(line)
        code = process.wait()
    except BaseException:
        end(process)
        raise
    finally:
        timer.cancel()
        timer.join()
        process.stdout.close()
    return None if cut.is_set() else code


def end(process: subprocess.Popen) -> None:
    """It and what it started: first asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def environment() -> dict[str, str]:
    """Ours, in which a checkout that is not installed is found from anywhere."""
    places = [str(HOME), str(Path(fasttrain_kernels.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONUNBUFFERED": "1"}


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the part that runs too, which has a session of its own."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(ended: list[Ended], parts: Mapping[PartName, Part], folder: Path) -> Report:
    """A table of the parts, the last words of those that failed, and every part's own table."""
    lines = ["| part | | s |", "| --- | --- | --- |"]
    lines += [f"| {part.name} | {part.status} | {part.seconds:.0f} |" for part in ended]
    for part in ended:
        if part.last:
            lines += ["", f"{part.name} {part.status}; its last lines:", "", *(f"    {line}" for line in part.last)]
    rows = [part._asdict() for part in ended]
    for part in ended:
        for result in parts[part.name].results if part.seconds else ():
            rows += [{"part": part.name, **row} for row in _rows(folder / f"{result}.json")]
            lines += ["", f"## {result.capitalize()}", "", _table(folder / f"{result}.md")]
    passed = all(part.passed is not False for part in ended)
    return Report("\n".join(lines).rstrip(), rows, {}, "", passed)


def _rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _table(file: Path) -> str:
    """Its Markdown without title, command and versions."""
    return file.read_text().split("\n\n", 3)[-1].rstrip() if file.exists() else "nothing was found"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


__all__ = ["GpuBenchConfig", "PartName", "parts_of", "run_parts"]
