"""Benchmarks: contestants that do the same work, timed alternately in one run.

  python launch/bench.py loader data.root=/data/imagenet                  our DALI loader beside a bare DALI pipeline
  python launch/bench.py loader data.root=/data/cifar.beton loader.kind=ffcv augment.size=32 augment.blur=0
  python launch/bench.py step                                             penalties, adversarial views, FARE
  python launch/bench.py attack precision=fp32                            APGD on the embedding distance
  python launch/bench.py step quick=true                                  tiny sizes: does all of it run?

Prints a Markdown table and writes it with the numbers as JSON, and a bar chart beside that. `<task> --help` lists the
keys of a task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from fasttrain import cli
from fasttrain.benchmarks.attack import AttackBenchConfig, compare_attacks
from fasttrain.benchmarks.loader import compare_loaders
from fasttrain.benchmarks.step import StepBenchConfig, compare_steps
from fasttrain.benchmarks.timing import Report, bars, machine, table
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig


class BenchConfig(Config):
    """What to time, how often."""

    task: Literal["loader", "step", "attack"]
    "loader, step or attack; the first argument"
    rounds: int = Field(5, ge=1)
    "rounds of each contestant"
    quick: bool = False
    "tiny sizes where none is given, and one round: to see that all of it runs"
    output: str = "bench.json"
    "the JSON file; the chart goes beside it"


class LoaderBench(BenchConfig):
    """What to load."""

    batch: int = Field(128, ge=1)
    "images a batch"
    batches: int = Field(20, ge=1)
    "batches a round"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()


class StepBench(BenchConfig, StepBenchConfig):
    """What network, on what."""


class AttackBench(BenchConfig, AttackBenchConfig):
    """What network, on what."""


def bench_loader(config: LoaderBench) -> Report:
    catalog = open_catalog(config.data, "train")
    timings = compare_loaders(catalog, config.augment, config.loader, config.batch, config.batches, config.rounds)
    rates = {timing.name: timing.rate for timing in timings}
    return Report(table(timings, "images"), [timing._asdict() for timing in timings], rates, "images/s")


class Task(NamedTuple):
    schema: type[BenchConfig]
    run: Callable[[Any], Report]
    quick: dict[str, Any]


TINY = {"rounds": 1, "batch": 8, "size": 16, "model": {"width": 0.0625}}
TASKS = {
    "loader": Task(LoaderBench, bench_loader, {"rounds": 1, "batch": 8, "batches": 2}),
    "step": Task(StepBench, lambda config: compare_steps(config, config.rounds), TINY),
    "attack": Task(AttackBench, lambda config: compare_attacks(config, config.rounds), TINY),
}


def bench(config: BenchConfig) -> None:
    report = TASKS[config.task].run(config)
    command = " ".join(["python", "launch/bench.py", *sys.argv[1:]])
    print(f"{machine()}\n`{command}`\n\n{report.text}")
    result = {"command": command, "machine": machine(), "config": config.model_dump(mode="json"), "rows": report.rows}
    output = Path(config.output)
    output.write_text(json.dumps(result, indent=1) + "\n")
    bars(report.bars, report.unit, output.with_suffix(".png"))


def quick(given: dict[str, Any]) -> dict[str, Any]:
    """The task's tiny sizes, where they are asked for."""
    task = TASKS.get(given.get("task"))
    return task.quick if task is not None and given.get("quick") else {}


if __name__ == "__main__":
    named = sys.argv[1].removeprefix("task=") if len(sys.argv) > 1 else ""
    schema = TASKS[named].schema if named in TASKS else BenchConfig
    cli.main(schema, bench, __doc__, positional=("task",), base=quick)
