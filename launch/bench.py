"""Benchmarks: contestants that do the same work, timed alternately in one run.

  python launch/bench.py gpu                         a new machine: facts, tests, truth, benchmarks, in 8 minutes
  python launch/bench.py kernels                     each kernel and pass beside PyTorch and peers, against ceilings
  python launch/bench.py loader data.root=/data/imagenet beton=/data/imagenet-ffcv/train.beton
                                                     ours beside torchvision, kornia, lightly, solo-learn, DALI, FFCV
  python launch/bench.py loader data.root=/data/cifar.beton loader.kind=ffcv peers=[ffcv] augment.size=32 augment.blur=0
  python launch/bench.py lock data.root=/data/imagenet       what the loaders take of the interpreter's lock
  python launch/bench.py step                        penalties, adversarial views, FARE
  python launch/bench.py attack precision=fp32       APGD on the embedding distance; AutoAttack and its parts
  python launch/bench.py train configs/pretrain/simclr_cifar10.yaml data.root=/data/cifar-10-batches-py
                                                     the real loop from files, beside what its parts would allow
  python launch/bench.py truth                       kernels against float64, waits of the host, every mode, each step
  python launch/bench.py all loader.data.root=/data/imagenet step.model.arch=resnet50    the first four; keys by task
  python launch/bench.py all --quick                 tiny sizes: does all of it run?

Prints a Markdown table and writes it as a file, the numbers as JSON beside that, and a bar chart a task. Files are
written as results come, so that a time limit loses none. The exit code is 0, or 1 where something was found wrong.
`<task> --help` lists the keys of a task; kernels/benchmarks/METHOD.md says how it is measured.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pretrain import PretrainConfig, build, of_weights
from pydantic import Field

from fasttrain import cli, distributed
from fasttrain.benchmarks.autoattack import AttacksBenchConfig, compare_all
from fasttrain.benchmarks.gpu import GpuBenchConfig, run_parts
from fasttrain.benchmarks.kernels import KernelBenchConfig, compare_kernels
from fasttrain.benchmarks.loader import LoaderBenchConfig, compare_loaders
from fasttrain.benchmarks.lock import LockBenchConfig, compare_lock
from fasttrain.environment import hardware, versions
from fasttrain.benchmarks.record import Record
from fasttrain.benchmarks.step import StepBenchConfig, compare_steps
from fasttrain.benchmarks.timing import Report
from fasttrain.benchmarks.train import compare_train
from fasttrain.benchmarks.truth import TruthConfig, tell_truth
from fasttrain.config import Config, PathText, Where
from fasttrain.errors import UsageError
from fasttrain.printable import printable
from fasttrain.run import RunConfig
from fasttrain_kernels.heap import keep_heap

import torch


class BenchConfig(Config):
    """What to time, how often."""

    task: Literal["kernels", "loader", "step", "attack", "all", "lock", "train", "truth", "gpu"]
    "kernels, loader, step, attack, or all of these; lock, train, truth or gpu; the first argument"
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


class LockBench(BenchConfig, LockBenchConfig):
    """What to load beside."""


class StepBench(BenchConfig, StepBenchConfig):
    """What network, on what."""


class AttackBench(BenchConfig, AttacksBenchConfig):
    """What network, on what."""


class AllBench(BenchConfig):
    """Every task, each with its own keys."""

    kernels: KernelBenchConfig = KernelBenchConfig()
    loader: LoaderBenchConfig = LoaderBenchConfig()
    step: StepBenchConfig = StepBenchConfig()
    attack: AttacksBenchConfig = AttacksBenchConfig()


class TrainBench(BenchConfig, PretrainConfig):
    """What is trained, as launch/pretrain.py takes it: a run's own YAML file will do."""

    window: int | None = Field(None, ge=1)
    "optimiser steps of a round; null: 3 on a CPU, 30 on a GPU"

    reads: ClassVar[dict[str, Where]] = {
        "evaluate": Where("task", ("pretrain",), "nothing is evaluated here"),
        "export": Where("task", ("pretrain",), "nothing is exported here"),
    }

    def doubts(self) -> list[str]:
        others = self.run != RunConfig(seed=self.run.seed)
        return ["run: of it the seed alone is read here"] if others else []


class TruthBench(BenchConfig, TruthConfig):
    """Which sections."""


class GpuBench(BenchConfig, GpuBenchConfig):
    """Which parts, in what time."""

    rounds: int = Field(2, ge=1)
    "rounds of each contestant"
    output: PathText = "gpu/gpu.json"
    "the JSON file; in its folder go the table, and each part's log and results"


def train(config: TrainBench, rounds: int) -> Iterator[Report]:
    device = distributed.initialize(config.train.device, deterministic=config.train.deterministic)
    evaluate = config.evaluate.model_copy(update={"every_epochs": 0.0})
    config = config.model_copy(update={"train": config.train.on(device), "evaluate": evaluate})
    torch.manual_seed(config.run.seed)
    parts = build(config, device)
    window = config.window or (30 if device.type == "cuda" else 3)
    yield from compare_train(config, window, rounds, parts.module, parts.loader, device)


def gpu(config: GpuBench, rounds: int) -> Iterator[Report]:
    tiny = config.quick or not torch.cuda.is_available()
    yield from run_parts(config, rounds, tiny, Path(config.output).parent.absolute(), Path(__file__))


class Task(NamedTuple):
    schema: type[BenchConfig]
    run: Callable[[Any, int], Iterator[Report]]
    quick: dict[str, Any]


TINY = {"batch": 8, "size": 16, "model": {"width": 0.25}}  # narrower, oneDNN fails the plain steps on some CPUs
TINY_SEARCH = {
    "autoattack": {
        "model": {"arch": "resnet18", "stem": "cifar", "width": 0.0625},
        "images": 8,
        "size": 16,
        "iterations": 2,
        "targets": 1,
        "queries": 2,
    }
}
TINY_KERNELS = {"copy_mib": 4, "images": 48, "dim": 16, "batch": 4, "channels": 8, "size": 8, "pixels": 16, "side": 256}
TINY_RUN = {
    "window": 1,
    "augment": {"size": 16},
    "model": {"width": 0.0625, "head": {"width": 8, "out": 8}},
    "train": {"batch": 8},
}
TASKS = {
    "kernels": Task(KernelBench, compare_kernels, TINY_KERNELS),
    "loader": Task(LoaderBench, compare_loaders, {"batch": 8, "batches": 2}),
    "lock": Task(LockBench, compare_lock, {"batch": 8, "seconds": 0.1}),
    "step": Task(StepBench, compare_steps, TINY),
    "attack": Task(AttackBench, compare_all, TINY | TINY_SEARCH),
    "train": Task(TrainBench, train, TINY_RUN),
    "truth": Task(TruthBench, tell_truth, {"steps": ["plain"]}),
    "gpu": Task(GpuBench, gpu, {}),
}
ALL = ("kernels", "loader", "step", "attack")
"Those that `all` runs."


def bench(config: BenchConfig) -> int:
    distributed.choose_algorithms(deterministic=False)
    if config.heap == "kept":
        keep_heap()
    places = places_of(Path(config.output), ALL if config.task == "all" else [config.task])
    parts = {name: getattr(config, name) for name in ALL} if config.task == "all" else {config.task: config}
    command = printable(" ".join(["python", "launch/bench.py", *sys.argv[1:]]))
    date, machine, found = datetime.date.today().isoformat(), hardware(), versions()
    facts = {"command": command, "date": date, "machine": machine, "versions": found}
    lines = [f"`{command}`", ", ".join(f"{name} {version}" for name, version in found.items()) + "."]
    title = f"{config.task.capitalize()} on {machine}, {date}"
    record = Record(places, title, lines, facts | {"config": config.model_dump(mode="json")})
    reports: dict[str, Report] = {}
    for name, part in parts.items():
        for report in TASKS[name].run(part, config.rounds):
            reports[name] = report
            record.keep(reports)
    record.finish(reports)
    return 0 if all(report.passed for report in reports.values()) else cli.EXIT_FAILED


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
    of_all = {name: sizes[name] for name in ALL}
    return {"rounds": 1, **(of_all if given.get("task") == "all" else sizes.get(given.get("task"), {}))}


def base(given: dict[str, Any]) -> dict[str, Any]:
    """What stands where nothing was given."""
    return {**(of_weights(given) if given.get("task") == "train" else {}), **quick(given)}


if __name__ == "__main__":
    named = [argument.lstrip("-").removeprefix("task=") for argument in sys.argv[1:]]
    task = next((name for name in named if name in TASKS or name == "all"), "")
    cli.main(schema_of(task), bench, __doc__, positional=("task",), base=base)
