"""The frame that all evaluations share: what they are of, where results go, tasks, one result on any ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from fasttrain.config import load
from fasttrain.data.catalog import Catalog
from fasttrain.errors import UsageError
from fasttrain.evaluation.evaluation import (
    ComparisonConfig,
    EvaluationData,
    fingerprint,
    place_of,
    split_arrays,
    subjects_of,
)
from fasttrain.evaluation.knn import KNNEvaluation, knn
from fasttrain.evaluation.linear import LinearConfig, alone, fit_classifier
from fasttrain.evaluation.tasks import Tasks, task_of, tasks_of
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from tests.ranks import run_ranks
from tests.test_launch import ROOT, environment, script

TINY = ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(layers=0))


def comparison(*arguments: str) -> ComparisonConfig:
    return load(ComparisonConfig, list(arguments), positional=("task", "source"))


def test_the_last_positional_key_takes_all_that_is_left():
    config = comparison("curves", "a", "c.pth", "batch=7", "d")
    assert config.sources == ("a", "c.pth", "d") and config.batch == 7
    assert comparison("curves", "source=[x,y]").sources == ("x", "y")
    with pytest.raises(UsageError, match=r"unknown key 'wrong'"):
        comparison("curves", "a", "wrong=3")
    with pytest.raises(UsageError, match="'a' is given 2 times"):
        comparison("curves", "a", "a")
    with pytest.raises(UsageError, match=r"1 names for 2 sources"):
        comparison("curves", "a", "b", "names=[x]")


def run_folder(place: Path, seed: int, temperature: float = 0.5) -> str:
    place.mkdir(parents=True)
    saved = {"run": {"dir": str(place), "seed": seed}, "terms": {"simclr": {"temperature": temperature}}}
    (place / "config.yaml").write_text(yaml.safe_dump(saved))
    return str(place)


def test_runs_that_differ_in_their_seed_alone_are_one_method(tmp_path):
    runs = [run_folder(tmp_path / f"simclr_{seed}", seed) for seed in (0, 1)]
    other = run_folder(tmp_path / "simclr_hot", 0, temperature=2)
    subjects = subjects_of(comparison("curves", *runs, other, str(tmp_path / "x.pth")))
    assert [subject.method for subject in subjects] == ["simclr", "simclr", "simclr_hot", "x"]
    assert [subject.name for subject in subjects] == ["simclr_0", "simclr_1", "simclr_hot", "x"]
    named = subjects_of(comparison("curves", *runs, other, "names=[a,b,b]"))
    assert [subject.method for subject in named] == ["a", "b", "b"]


def test_runs_whose_folders_share_a_name_are_told_apart(tmp_path):
    runs = [run_folder(tmp_path / name / "run", 0, temperature=t) for name, t in (("a", 1), ("b", 2))]
    assert [s.name for s in subjects_of(comparison("curves", *runs))] == ["a/run", "b/run"]
    assert [s.method for s in subjects_of(comparison("curves", *runs))] == ["a/run", "b/run"]


def test_a_result_lies_beside_the_weights_or_in_the_folder_of_all(tmp_path):
    runs = [run_folder(tmp_path / "runs" / name, 0) for name in ("a", "b")]
    one, both = (comparison("curves", *sources) for sources in (runs[:1], runs))
    assert place_of(one, subjects_of(one)) == Path(runs[0]) / "eval-curves.json"
    assert place_of(both, subjects_of(both)) == tmp_path / "runs/eval-curves.json"
    given = comparison("curves", *runs, f"output={tmp_path / 'x.json'}")
    assert place_of(given, subjects_of(given)) == tmp_path / "x.json"


class Inner(NamedTuple):
    values: torch.Tensor
    count: int


class Outer(NamedTuple):
    parts: list[Inner]
    by_name: dict[str, torch.Tensor]
    share: float


def test_a_result_is_plain_values_and_arrays_by_name():
    found = Outer([Inner(torch.ones(2), 3)], {"a b": torch.zeros(1, 4)}, 0.5)
    plain, arrays = split_arrays(found)
    assert json.loads(json.dumps(plain))["parts"][0] == {
        "values": {"array": "parts.0.values", "shape": [2]},
        "count": 3,
    }
    assert arrays.keys() == {"parts.0.values", "by_name.a b"} and plain["share"] == 0.5


def test_weights_are_told_apart_by_every_value():
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    before = fingerprint(encoder)
    assert before == fingerprint(encoder)
    encoder.backbone.bn1.running_mean[0] += 1e-7
    assert fingerprint(encoder) != before


def catalog(count: int) -> Catalog:
    names = [f"c{number}" for number in range(count)]
    labels = np.arange(3 * count) % count
    return Catalog("val", names, labels, np.arange(3 * count), np.zeros((3 * count, 2), np.int32), Path("/data"))


def test_tasks_are_read_as_labels_names_or_words():
    hundred, twelve = catalog(100), catalog(12)
    assert [task.classes for task in tasks_of("paper", hundred)] == [
        (0, 1, 2, 3, 4),
        (6, 11, 16, 21, 26),
        (56, 58, 62, 66, 68),
        (95, 96, 97, 98, 99),
    ]
    drawn = tasks_of("random:2", twelve, seed=3)
    assert drawn == tasks_of("random:2", twelve, seed=3) != tasks_of("random:2", twelve, seed=4)
    assert len({label for task in drawn for label in task.classes}) == 10
    (whole,) = tasks_of("all", twelve)
    assert whole.classes == tuple(range(12)) == task_of(None, twelve).classes
    task = task_of(("c7", 2), twelve)
    assert task.members(twelve, np.arange(24)).tolist() == [2, 7, 14, 19]
    assert task.relabelled(torch.tensor([2, 7, 2])).tolist() == [1, 0, 1]

    class Asked(ComparisonConfig):
        tasks: Tasks = "paper"

    given = ["curves", "a"]
    for text, value in (("random:4", "random:4"), ("[[0,1],[cat,no]]", ((0, 1), ("cat", "no")))):
        assert load(Asked, [*given, f"tasks={text}"], positional=("task", "source")).tasks == value


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("paper", r"tasks=paper are of CIFAR-100's labels .* has 12 classes: give .*, or tasks=random:4"),
        ("random:3", r"3 disjoint 5-way tasks need 15 classes, and '/data' has 12"),
        ("random:0", r"tasks=random:0: should be paper, all, random:N or lists"),
        ("papers", r"tasks=papers: should be paper, all, random:N or lists"),
        ([("c1",)], r"task \[c1\] has 1 class: there is nothing to tell apart"),
        ([()], r"task \[\] has 0 class"),
        ([(1, "c1")], r"task \[1, c1\] has a class twice"),
        (
            [(1, 12)],
            r"class 12 is none of the 12 in '/data' \(c0, c1, c2, c3, c4, …\): give labels from 0 to 11, or names",
        ),
        ([(1, "dog")], r"class 'dog' is none of the 12"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(asked, message):
    with pytest.raises(UsageError, match=message):
        tasks_of(asked, catalog(12))


def data_of(images: Path, batch: int) -> EvaluationData:
    given = [f"data.root={images}", "augment.size=16", f"batch={batch}", "loader.threads=1"]
    config = load(KNNEvaluation, ["task=knn", "source=x", *given])
    return EvaluationData(config, torch.device("cpu"), None)


def _features_and_fit(images: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder = Encoder(TINY).eval()
    data = data_of(Path(images), batch=5)
    found = data.all_features(encoder, "train", data.choose("train", 22))
    (splits, shared) = data.features(encoder, train=data.choose("train"), val=data.choose("val"))
    probe = fit_classifier(found, 2, LinearConfig(), alone)
    assert not shared and data.facts()["val"]["images"] == 12
    accuracy = knn(splits["train"], splits["val"], shared=False)
    return {
        "features": found.features,
        "labels": found.labels,
        "index": found.index,
        "weight": probe.weight,
        "top1": torch.tensor(accuracy.top1),
    }


def test_features_and_what_is_fitted_to_them_are_the_same_bits_on_any_number_of_ranks(images):
    one = _features_and_fit(str(images))
    for found in run_ranks(3, _features_and_fit, str(images)):
        assert all(found[name].equal(value) for name, value in one.items())
    assert one["index"].tolist() == sorted(one["index"].tolist()) and len(one["index"]) == 22


def test_help_lists_a_tasks_own_keys():
    def helped(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "launch/eval.py"), *arguments, "--help"]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout

    tasks = script("eval").TASKS
    said = helped()
    assert all(f"\n  {task} " in said for task in tasks)
    said = helped("knn")
    assert "\n  knn.neighbours " in said and "linear.l2" not in said
