"""Benchmarks: contestants that do the same work, timed alternately in one run.

  python launch/bench.py kernels                     each kernel and pass beside PyTorch and peers, against ceilings
  python launch/bench.py loader data.root=/data/imagenet                  our DALI loader beside a bare DALI pipeline
  python launch/bench.py loader data.root=/data/cifar.beton loader.kind=ffcv augment.size=32 augment.blur=0
  python launch/bench.py step                        penalties, adversarial views, FARE
  python launch/bench.py attack precision=fp32       APGD on the embedding distance
  python launch/bench.py all loader.data.root=/data/imagenet step.model.arch=resnet50    the four; keys by task
  python launch/bench.py all --quick                 tiny sizes: does all of it run?

Prints a Markdown table and writes it as a file, the numbers as JSON beside that, and a bar chart a task.
`<task> --help` lists the keys of a task; kernels/benchmarks/METHOD.md says how it is measured.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from fasttrain import cli, distributed
from fasttrain.benchmarks.attack import AttackBenchConfig, compare_attacks
from fasttrain.benchmarks.kernels import KernelBenchConfig, compare_kernels
from fasttrain.benchmarks.loader import LoaderBenchConfig, compare_loaders
from fasttrain.benchmarks.machine import hardware, versions
from fasttrain.benchmarks.step import StepBenchConfig, compare_steps
from fasttrain.benchmarks.timing import Report, bars
from fasttrain.config import Config, PathText
from fasttrain.errors import UsageError
from fasttrain.output import try_output, write_output
from fasttrain.printable import printable
from fasttrain_kernels.heap import keep_heap

ELSEWHERE = "choose another place with output=…"


class BenchConfig(Config):
    """What to time, how often."""

    task: Literal["kernels", "loader", "step", "attack", "all"]
    "kernels, loader, step, attack or all; the first argument"
    rounds: int = Field(5, ge=1)
    "rounds of each contestant"
    quick: bool = False
    "tiny sizes where none is given, and one round: to see that all of it runs; --quick is the same"
    heap: Literal["kept", "glibc"] = "kept"
    "on a CPU, for all contestants: freed memory is kept for the next step, as our training does, or glibc's defaults"
    output: PathText = "bench.json"
    "the JSON file; the table goes beside it as Markdown, and the chart"


class KernelBench(BenchConfig, KernelBenchConfig):
    """Which kernels, at what sizes."""


class LoaderBench(BenchConfig, LoaderBenchConfig):
    """What to load."""


class StepBench(BenchConfig, StepBenchConfig):
    """What network, on what."""


class AttackBench(BenchConfig, AttackBenchConfig):
    """What network, on what."""


class AllBench(BenchConfig):
    """Every task, each with its own keys."""

    kernels: KernelBenchConfig = KernelBenchConfig()
    loader: LoaderBenchConfig = LoaderBenchConfig()
    step: StepBenchConfig = StepBenchConfig()
    attack: AttackBenchConfig = AttackBenchConfig()


class Task(NamedTuple):
    schema: type[BenchConfig]
    run: Callable[[Any, int], Report]
    quick: dict[str, Any]


TINY = {"batch": 8, "size": 16, "model": {"width": 0.25}}  # narrower, oneDNN fails the plain steps on some CPUs
TINY_KERNELS = {"copy_mib": 4, "images": 48, "dim": 16, "batch": 4, "channels": 8, "size": 8, "pixels": 16, "side": 256}
TASKS = {
    "kernels": Task(KernelBench, compare_kernels, TINY_KERNELS),
    "loader": Task(LoaderBench, compare_loaders, {"batch": 8, "batches": 2}),
    "step": Task(StepBench, compare_steps, TINY),
    "attack": Task(AttackBench, compare_attacks, TINY),
}


def bench(config: BenchConfig) -> None:
    distributed.choose_algorithms(deterministic=False)
    if config.heap == "kept":
        keep_heap()
    output = Path(config.output)
    places = places_of(output, TASKS if config.task == "all" else [config.task])
    for place in places.values():
        try_output(place, ELSEWHERE)
    parts = {name: getattr(config, name) for name in TASKS} if config.task == "all" else {config.task: config}
    reports = {name: TASKS[name].run(part, config.rounds) for name, part in parts.items()}
    command = printable(" ".join(["python", "launch/bench.py", *sys.argv[1:]]))
    date, machine, found = datetime.date.today().isoformat(), hardware(), versions()
    result = {
        "command": command,
        "date": date,
        "machine": machine,
        "versions": found,
        "config": config.model_dump(mode="json"),
        "rows": [{"task": name} | row for name, report in reports.items() for row in report.rows],
    }
    with_versions = ", ".join(f"{name} {version}" for name, version in found.items())
    lines = [f"# {config.task.capitalize()} on {machine}, {date}", f"`{command}`", f"{with_versions}."]
    for name, report in reports.items():
        lines += [f"## {name.capitalize()}"] * (len(reports) > 1) + [report.text]
    text = "\n\n".join(lines)
    print(text, flush=True)
    write_output(places["table"], text + "\n", ELSEWHERE)
    write_output(places["numbers"], json.dumps(result, indent=1) + "\n", ELSEWHERE)
    for name, report in reports.items():
        write_output(places[name], bars(report.bars, report.unit), ELSEWHERE)


def places_of(output: Path, tasks: Iterable[str]) -> dict[str, Path]:
    """Where the numbers, the table and each task's chart go.

    Raises:
        UsageError: two of them to one place.
    """
    tasks = list(tasks)
    charts = [output.with_name(f"{output.stem}_{name}.png") for name in tasks]
    if len(tasks) == 1:
        charts = [output.with_suffix(".png")]
    places = {"numbers": output, "table": output.with_suffix(".md"), **dict(zip(tasks, charts, strict=True))}
    if len(set(places.values())) < len(places):
        raise UsageError(f"output={output} is where the table or the chart goes: name the numbers' file, …json")
    return places


def schema_of(task: str) -> type[BenchConfig]:
    return TASKS[task].schema if task in TASKS else AllBench if task == "all" else BenchConfig


def quick(given: dict[str, Any]) -> dict[str, Any]:
    """The tiny sizes, where they are asked for."""
    if not given.get("quick"):
        return {}
    sizes = {name: task.quick for name, task in TASKS.items()}
    return {"rounds": 1, **(sizes if given.get("task") == "all" else sizes.get(given.get("task"), {}))}


if __name__ == "__main__":
    named = [argument.lstrip("-").removeprefix("task=") for argument in sys.argv[1:]]
    task = next((name for name in named if name in TASKS or name == "all"), "")
    cli.main(schema_of(task), bench, __doc__, positional=("task",), base=quick)
