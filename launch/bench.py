"""Benchmarks: contestants that do the same work, timed alternately in one run.

  python launch/bench.py loader data.root=/data/imagenet                  our DALI loader beside a bare DALI pipeline
  python launch/bench.py loader data.root=/data/cifar.beton loader.kind=ffcv augment.size=32 augment.blur=0

Prints a Markdown table and writes it with the numbers as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from fasttrain import cli
from fasttrain.benchmarks.loader import compare_loaders
from fasttrain.benchmarks.timing import machine, table
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig


class BenchConfig(Config):
    """What to time, on what, how often."""

    task: Literal["loader"]
    "loader; the first argument"
    batch: int = Field(128, ge=1)
    "images a batch"
    batches: int = Field(20, ge=1)
    "batches a round"
    rounds: int = Field(5, ge=1)
    "rounds of each contestant"
    output: str = "bench.json"
    "the JSON file"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()


def bench(config: BenchConfig) -> None:
    catalog = open_catalog(config.data, "train")
    timings = compare_loaders(catalog, config.augment, config.loader, config.batch, config.batches, config.rounds)
    command = " ".join(["python", "launch/bench.py", *sys.argv[1:]])
    print(f"{machine()}\n`{command}`\n\n{table(timings, 'images')}")
    rows = [timing._asdict() for timing in timings]
    result = {"command": command, "machine": machine(), "config": config.model_dump(mode="json"), "rows": rows}
    Path(config.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.main(BenchConfig, bench, __doc__, positional=("task",))
