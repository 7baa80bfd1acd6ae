"""Evaluate encoders: one command a table or figure, on a run's own data or any other.

  python launch/eval.py knn    runs/pretrain                              a run's folder, on the run's own data
  python launch/eval.py linear runs/pretrain data.root=/data/cifar10
  python launch/eval.py linear resnet50.pth model.arch=resnet50 data.root=/data/imagenet augment.size=224
  python launch/eval.py robust runs/finetune robust.attack.eps_255=4 robust.attack.steps=50 robust.images=1000
  torchrun --nproc-per-node 8 launch/eval.py knn …                        the same result, on any number of ranks

{tasks}

`<task> --help` lists the keys of a task. The table is printed and written as JSON, and the picture as PNG, by default
beside what is evaluated; the place is tried first. The same command run again goes on from the parts that are done
(in eval-<task>.parts). Ctrl-C, SIGTERM and SIGUSR1 end it with code 75, and what is done is kept. Features or scores
that are not finite are an error, which says whose doing it is.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from fasttrain import cli, distributed, inherited
from fasttrain.environment import command, hardware, now, versions
from fasttrain.benchmarks.record import plain
from fasttrain.evaluation.evaluation import (
    Evaluation,
    EvaluationConfig,
    EvaluationData,
    SourceConfig,
    place_of,
    split_arrays,
    subjects_of,
)
from fasttrain.evaluation.parts import Parts
from fasttrain.figures import png
from fasttrain.output import try_output, write_output
from fasttrain.precision import autocast_dtype, decide
from fasttrain.printable import printable
from fasttrain.stop import Stopped, StopRequest

from safetensors.torch import save

ELSEWHERE = "choose another place with output=…"

TASKS = ("knn", "linear", "robust", "labels", "curves", "transfer", "trajectory", "landscape", "views", "fare")
"Each a module of fasttrain.evaluation."
EVALUATIONS: dict[str, Evaluation] = {task: import_module(f"fasttrain.evaluation.{task}").EVALUATION for task in TASKS}


class EvalConfig(EvaluationConfig):
    """Of a task that is not one of them, or of none."""

    task: Literal[TASKS]  # type: ignore[valid-type]
    "which evaluation; the first argument"


def evaluate(config: SourceConfig) -> int:
    evaluation = EVALUATIONS[config.task]
    device = distributed.initialize(config.device)
    began = time.perf_counter()
    subjects = distributed.agree(lambda: subjects_of(config))
    output = distributed.agree(lambda: place_of(config, subjects))
    distributed.on_rank_zero(lambda: try_output(output, ELSEWHERE))
    precision = config.precision if isinstance(config, EvaluationConfig) else "fp32"
    data = EvaluationData(config, device, autocast_dtype(decide(precision, device)))
    parts = Parts(output.with_suffix(".parts") if output.suffix == ".json" else None)
    with StopRequest():
        try:
            found = evaluation.evaluate(subjects, data, config, parts)
        except Stopped:
            distributed.say("stopped: what is done is kept, and the same command goes on")
            return cli.EXIT_SAVED_ON_SIGNAL
    if distributed.rank() == 0:
        seconds = round(time.perf_counter() - began, 1)
        report(config, evaluation, found, data, output, seconds)
    return 0


def report(
    config: SourceConfig, evaluation: Evaluation, found: Any, data: EvaluationData, output: Path, seconds: float
) -> None:
    """Print the result, then write it: numbers as JSON, tensors as safetensors and the picture beside that."""
    values, arrays = split_arrays(found)
    table = {
        "task": config.task,
        "about": evaluation.about,
        "source": config.source,
        **data.facts(),
        **values,
        "lines": evaluation.lines(found),
        "command": command(),
        "seconds": seconds,
        "date": now(),
        "machine": hardware(),
        "ranks": distributed.world_size(),
        "versions": versions(),
        "settings": config.model_dump(mode="json"),
    }
    for line in table["lines"]:
        print(line, flush=True)
    if arrays:
        place = output.with_suffix(".safetensors")
        table["arrays"] = place.name
        write_output(place, save({name: tensor.cpu().contiguous() for name, tensor in arrays.items()}), ELSEWHERE)
    write_output(output, json.dumps(plain(table), indent=1) + "\n", ELSEWHERE)
    print(f"{'written to':16s}{printable(output)}")
    if evaluation.figure is not None:
        place = output.with_suffix(".png")
        write_output(place, png(evaluation.figure(found)), ELSEWHERE)
        print(f"{'picture':16s}{printable(place)}")


def of_run(given: dict[str, Any]) -> dict[str, Any]:
    """A run's own data, crops and loader, where nothing else is asked for; of several runs the first's."""
    if not issubclass(schema_of(given.get("task", "")), EvaluationConfig):
        return {}
    source = given.get("source")
    source = source[0] if isinstance(source, list) and source else source
    saved = inherited.settings_of(source)
    return inherited.data_of(saved, given) | {key: saved[key] for key in ("augment",) if key in saved}


def schema_of(task: str) -> type[SourceConfig]:
    return EVALUATIONS[task].config if task in EVALUATIONS else EvalConfig


if __name__ == "__main__":
    named = [argument.lstrip("-").removeprefix("task=") for argument in sys.argv[1:]]
    task = next((name for name in named if name in EVALUATIONS), "")
    tasks = "\n".join(f"  {name:12s}{evaluation.about}" for name, evaluation in EVALUATIONS.items())
    cli.main(schema_of(task), evaluate, __doc__.format(tasks=tasks), positional=("task", "source"), base=of_run)
