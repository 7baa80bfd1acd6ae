"""Accuracy with a share of the labels: which images, what is fitted and fine-tuned, and the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fasttrain.config import load
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.errors import UsageError
from fasttrain.evaluation import labels
from fasttrain.evaluation.classifier import Linear
from fasttrain.evaluation.evaluation import EvaluationData, subjects_of
from fasttrain.evaluation.labels import LabelsEvaluation
from fasttrain.evaluation.linear import alone, fit_classifier
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.spread import Spread, spreads
from fasttrain.evaluation.tasks import Task
from fasttrain.export import export
from tests.ranks import run_ranks
from tests.test_launch import script
from tests.test_transfer import CPU, given, tiny


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "e0"
    folder.mkdir()
    export(tiny(), folder)
    return folder


def settings(images: Path, source: Path, *more: str) -> list[str]:
    return given("labels", images, f"source=[{source}]", "shares=[1,0.5]", "linear.l2=[0.1]", *more)


def config_of(images: Path, source: Path, *more: str) -> LabelsEvaluation:
    return load(LabelsEvaluation, settings(images, source, *more))


def found_by(config: LabelsEvaluation) -> labels.Labels:
    return labels.evaluate(subjects_of(config), EvaluationData(config, CPU, None), config, Parts(None))


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("shares=[]", "at least 1"),
        ("shares=[0]", "share 0: should be above 0 and at most 1"),
        ("shares=[1.5]", "share 1.5: should be above 0 and at most 1"),
        ("shares=[-0.1]", "share -0.1: should be above 0 and at most 1"),
        ("shares=[0.1,1,0.1]", "share 0.1 is given 2 times: give each once"),
        ("heads=[mlp,mlp]", "head mlp is given 2 times: give each once"),
        ("heads=[conv]", "'linear' or 'mlp'"),
    ],
)
def test_shares_and_heads_that_make_no_sense_are_a_line(images, setting, complaint):
    with pytest.raises(UsageError, match=complaint):
        config_of(images, Path("x"), setting)


@pytest.mark.parametrize(
    ("shares", "held_out", "complaint"),
    [
        ("[1,0.05]", 0.1, r"share 0.05 is 1 training image of class 'cat', and choosing one of linear.l2=.* one l2"),
        ("[0.1]", 0.999, r"share 0.1 is 4 training images, and choosing one of linear.l2="),
    ],
)
def test_too_few_images_to_choose_an_l2_by_are_a_line(images, shares, held_out, complaint):
    catalog = open_catalog(DataConfig(root=str(images)), "train")
    few = config_of(images, Path("x"), f"shares={shares}", "linear.l2=[0.1,0.2]", f"linear.held_out={held_out}")
    with pytest.raises(UsageError, match=complaint):
        labels._subsets(catalog, few)
    assert labels._subsets(catalog, config_of(images, Path("x"), f"shares={shares}"))


def test_a_share_of_the_data_is_not_taken_over_from_a_run_and_said_where_it_is_given(images):
    said = []
    config = load(LabelsEvaluation, settings(images, Path("x"), "data.share=0.5"), say=said.append)
    assert said == ["WARNING: data.share=0.5 is given and not used: data.shares says how much is taken"]
    data = EvaluationData(config, CPU, None)
    assert len(data.train) == 24
    said.clear()
    load(LabelsEvaluation, settings(images, Path("x")), base=lambda given: {"data": {"share": 0.1}}, say=said.append)
    assert not said


def test_the_files_name_the_images_of_data_share_and_are_nested(images, tmp_path):
    catalog = open_catalog(DataConfig(root=str(images)), "train")
    shares = (1.0, 0.5, 0.1)
    subsets = labels._subsets(catalog, config_of(images, Path("x"), "shares=[1,0.5,0.1]"))
    files = labels._write(tmp_path / "eval-labels.json", subsets)
    assert list(files.values()) == [str(tmp_path / f"eval-labels-{share:g}.txt") for share in shares]
    found = []
    for share, place in zip(shares, files.values(), strict=True):
        rows = [line.split("\t") for line in Path(place).read_text().splitlines() if not line.startswith("#")]
        theirs = open_catalog(DataConfig(root=str(images), share=share), "train")
        assert [int(index) for index, _, _ in rows] == theirs.indices.tolist()
        assert all((images / "train" / file).exists() and file.startswith(name) for _, name, file in rows)
        assert len({sum(name == one for _, name, _ in rows) for one in ("cat", "dog")}) == 1, "balanced"
        found.append({index for index, _, _ in rows})
    assert found[0] > found[1] > found[2] and len(found[2]) == 4
    head = f"# share 0.5 of each class's training images in {images}/train, 12 of them"
    assert Path(files["0.5"]).read_text().startswith(head)


def test_frozen_is_logistic_regression_on_that_share(images, encoder):
    config = config_of(images, encoder, "heads=[]", "shares=[0.5]")
    found = found_by(config)
    data = EvaluationData(config, CPU, None)
    loaded = subjects_of(config)[0].load(CPU)
    train, val = (
        data.all_features(loaded, split, indices)
        for split, indices in (("train", data.train.thinned(0.5).indices), ("val", data.val.indices))
    )
    probe = fit_classifier(train, 2, config.linear, alone)
    right = (val.features @ probe.weight.T + probe.bias).argmax(1) == val.labels
    assert [run["accuracy"] for run in found.runs] == [pytest.approx(100 * float(right.float().mean()))]
    assert found.accuracy["e0"]["0.5"]["frozen"].sd is None and found.images == {"0.5": 12}


def supervised_run(encoder: Path, folder: Path, images: Path) -> Path:
    """What evaluations read of a run that was trained by cross-entropy on half of the images."""
    shutil.copytree(encoder, folder)
    config = {
        "run": {"seed": 0},
        "data": {"root": str(images), "share": 0.5},
        "terms": {"supervised": {"objective": "cross_entropy"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_supervised_run_is_measured_by_its_own_classifier_where_it_was_trained(
    images,
    encoder,
    tmp_path,
    monkeypatch,
):
    run = supervised_run(encoder, tmp_path / "run", images)
    always_dogs = Linear(torch.zeros(2, 32), torch.tensor([0.0, 1.0]), Task("", (0, 1)))
    monkeypatch.setattr(labels, "classifier_of", lambda *_: always_dogs)
    found = found_by(config_of(images, run, "heads=[]"))
    assert [(run["share"], run["way"]) for run in found.runs] == [("1", "frozen"), ("0.5", "frozen"), ("0.5", "own")]
    assert found.accuracy["run"]["0.5"]["own"] == Spread(50.0, None, 1)
    assert " own" in labels.lines(found)[0] and "–" in labels.lines(found)[1]
    shutil.copytree(images, tmp_path / "other")
    found = found_by(config_of(tmp_path / "other", run, "heads=[]", "shares=[1]"))
    assert found.notes == [f"'{run}' was trained on other data: its own classifier is left out"]
    assert [run["way"] for run in found.runs] == ["frozen"]


def test_one_rank_finds_what_two_find(images, encoder, tmp_path):
    more = "shares=[0.5]", "epochs=1", "seeds=[0]", "hidden=5", f"output={tmp_path / 'o.json'}"
    config = config_of(images, encoder, *more)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    alone_found = found_by(config)
    torch.set_num_threads(threads)
    assert run_ranks(2, found_by, config) == [alone_found, alone_found]
    assert [run["way"] for run in alone_found.runs] == ["mlp", "linear", "frozen"]


def test_the_command_leaves_a_table_a_picture_and_files_and_does_nothing_twice(
    images,
    encoder,
    tmp_path,
    capsys,
    monkeypatch,
):
    shutil.copytree(encoder, tmp_path / "e0")
    module = script("eval")
    more = "heads=[linear]", "shares=[0.5]", "epochs=1"
    config = load(module.schema_of("labels"), settings(images, tmp_path / "e0", *more), module.of_run)
    assert module.evaluate(config) == 0
    said = capsys.readouterr().out
    assert "e0, 50 % of the labels" in said and "n of each: frozen 1, linear 2" in said
    assert f"12 images of share 0.5: {tmp_path / 'e0/eval-labels-0.5.txt'}" in said
    table = json.loads((tmp_path / "e0/eval-labels.json").read_text())
    assert table["train"]["images"] == 12 and table["images"] == {"0.5": 12}
    assert table["accuracy"]["e0"]["0.5"]["linear"]["n"] == 2 and (tmp_path / "e0/eval-labels.png").exists()

    monkeypatch.setattr(labels, "train_network", None)  # it comes to no work
    monkeypatch.setattr(EvaluationData, "all_features", None)
    assert module.evaluate(config) == 0
    again = json.loads((tmp_path / "e0/eval-labels.json").read_text())
    assert all(again[key] == table[key] for key in table.keys() - {"seconds", "date"})


def test_the_picture_has_shares_on_a_logarithmic_axis_and_percent_from_zero():
    runs = [
        {"method": method, "share": share, "way": way, "seed": seed, "accuracy": 50.0 + seed}
        for method in ("a", "b")
        for share in ("1", "0.01")
        for way in ("frozen", "mlp")
        for seed in (0, 1)
    ]
    found = labels.Labels(spreads(runs, "method", "share", "way"), {"1": 100, "0.01": 1}, runs, {}, [])
    sheet = labels.figure(found)
    (axis,) = sheet.axes
    assert axis.get_xscale() == "log" and axis.get_ylim()[0] == 0
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "100"]
    assert len(sheet.legends[0].get_texts()) == 4
