"""Files as trainings, evaluations and experiments leave them, for a report, and the page of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import yaml
from PIL import Image

from fasttrain.report.collect import collect
from fasttrain.report.page import html

HOSTILE = "<script>alert(1)</script>".replace("/", "∕")  # a name has no slash
NAMES = ("simclr_1", "simclr_2", "simclr_10", "two words", 'it\'s "so"', "日本 & ü", HOSTILE)
ENVIRONMENT = {
    "command": "launch/pretrain.py train.steps=400",
    "started": "2026-01-01T00:00:00+00:00",
    "done": "2026-01-01T00:10:00+00:00",
    "ranks": 2,
    "hosts": {"one": 2},
    "machine": "2 cores of a CPU",
    "versions": {"Python": "3.11", "torch": "2.9"},
    "git": {"commit": "0123456789abcdef", "changed": True},
    "earlier": [],
}


def picture(colour: str = "red") -> bytes:
    drawn = io.BytesIO()
    Image.new("RGB", (300, 100), colour).save(drawn, "png")
    return drawn.getvalue()


def make_run(folder: Path, number: int, reports: int = 40, environment: dict | None = ENVIRONMENT) -> Path:
    """A folder as a training leaves it; its kNN accuracy is 5 % a number."""
    folder.mkdir(parents=True)
    settings = {
        "run": {"dir": str(folder), "seed": number},
        "terms": {"simclr": {"objective": "nt_xent", "penalty": {"weight": number / 10}}},
        "train": {"epochs": 10, "steps": None, "batch": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {
            "step": 10 * i,
            "epoch": i / 4,
            "loss": 9 / i + number,
            "loss/a": 9 / i,
            "lr": 0.1,
            "images_per_second": 640,
        }
        for i in range(1, reports + 1)
    ]
    lines[3]["loss"] = None
    lines.append({"step": 10 * reports, "knn_top1": number / 20})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "curves.png").write_bytes(picture())
    return folder


def make_result(path: Path, task: str = "knn", **values: object) -> Path:
    said = {
        "task": task,
        "about": "accuracy of the nearest neighbours",
        "source": ["runs/simclr_1"],
        "command": f"launch/eval.py {task} runs/simclr_1",
        "seconds": 12.5,
        "date": "2026-01-01T00:00:00+00:00",
        "machine": "2 cores of a CPU",
        "versions": {"Python": "3.11", "torch": "2.8"},
        "settings": {"task": task, "data": {"root": "/data/" + "long/" * 40}},
    }
    path.write_text(json.dumps(said | values))
    path.with_suffix(".png").write_bytes(picture("blue"))
    return path


def make_paper(folder: Path) -> None:
    cell = {"mean": 41.234, "sd": 1.5, "n": 3, "paper": 45.1}
    columns = [f"{share} %" for share in (100, 50, 20, 10, 5, 2, 1, 0.5)]
    values = {
        "experiment": "tikhonov",
        "title": "Robustness <of> contrastive learning",
        "source": "A. Author, a paper",
        "scale": "small",
        "about": "a share of the images",
        "command": "launch/experiment.py configs/experiments/tikhonov.yaml",
        "tables": [{"name": "table1", "title": "Table 1", "unit": "%", "columns": columns, "rows": [
            {"name": "contrastive", "cells": [cell] * 7 + [None]},
            {"name": "supervised", "cells": [{**cell, "mean": None, "sd": math.nan}] * 8},
        ]}],
        "findings": [
            {"claim": "it is ahead", "shown": True, "value": 3.2, "error": 0.4, "unit": "%", "paper": 5.5},
            {"claim": "it is behind", "shown": False, "value": 0.1, "error": 0.4, "unit": "%", "why": "few seeds"},
            {"claim": "they are one", "shown": None, "value": 0.1, "error": 0.4},
            {"claim": "it was run", "shown": None},
        ],
        "figures": [
            {"name": "figure2", "about": "curves", "result": "eval-curves.json", "picture": "eval-curves.png"},
            {"name": "figure3", "about": "more", "result": "eval-more.json", "picture": "eval-more.png"},
        ],
        "commands": [
            {"name": "run", "command": "launch/pretrain.py", "state": "failed", "why": "the disk is full"}
        ],
    }  # fmt: skip
    (folder / "experiment.json").write_text(json.dumps(values))


def make_everything(root: Path) -> Path:
    """Runs of all kinds of names, two results, a paper; one run without an environment, one unfinished."""
    for number, name in enumerate(NAMES, 1):
        environment = {1: None, 2: ENVIRONMENT | {"done": None, "command": "launch/finetune.py"}}.get(
            number, ENVIRONMENT
        )
        make_run(root / "runs" / name, number, environment=environment)
    (root / "runs/two words/metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\nnonsense\n{"step": 20, "lo')
    wide = ["  ".join(f"column{i}" for i in range(30)), *(f"row {HOSTILE} {i}" for i in range(5))]
    make_result(root / "eval-curves.json", "curves", lines=wide)
    make_result(root / "runs/simclr_1/eval-knn.json", top1=0.4567, images=500)
    make_paper(root)
    return root


def page_of(*sources: Path) -> str:
    return html(
        collect([str(source) for source in sources]), "launch/report.py …", "2026-01-01T00:00:00+00:00"
    ).decode()
