"""Classifiers trained on an encoder, transfer to tasks of a few classes, and the trajectories of both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasttrain.config import load
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.data.order import Order
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation import transfer
from fasttrain.evaluation.evaluation import EvaluationData, Subject, subjects_of
from fasttrain.evaluation.finetuning import (
    Network,
    RandomCropConfig,
    Recipe,
    drawn_batches,
    linear_head,
    mlp_head,
    train,
    train_classifier,
    train_network,
)
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.spread import Spread, aligned, spread, spreads
from fasttrain.evaluation.tasks import Task, tasks_of
from fasttrain.evaluation.trajectories import FILE, read_trajectories
from fasttrain.export import export
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from tests.ranks import run_ranks
from tests.test_launch import script

CPU = torch.device("cpu")


def tiny(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(layers=0))).eval()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """Two, each in a folder of its own."""
    root = tmp_path_factory.mktemp("encoders")
    for number in range(2):
        (root / f"e{number}").mkdir()
        export(tiny(number), root / f"e{number}")
    return root


def given(task: str, images: Path, *more: str) -> list[str]:
    start = [f"task={task}", f"data.root={images}", "device=cpu", "augment.size=16", "batch=4", "loader.threads=1"]
    return [*start, "precision=fp32", "epochs=2", "train_batch=8", "seeds=[0,1]", *more]


def found_by(config: transfer.TransferEvaluation, parts: Parts) -> transfer.Transfer:
    return transfer.evaluate(subjects_of(config), EvaluationData(config, CPU, None), config, parts)


# ---------------------------------------------------------------- training


def test_a_classifier_is_that_of_a_plain_loop_in_float64():
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((37, 5)), draw.integers(0, 3, 37)
    recipe = Recipe(epochs=3, batch=8, lr=0.3, weight_decay=0.01, momentum=0.9)
    seen = []
    found = train_classifier(
        torch.from_numpy(x), torch.from_numpy(y), 3, recipe, 7, lambda epoch, model: seen.append(epoch)
    )

    start = linear_head(5, 3, 7)
    w, b = start.weight.detach().double().numpy().copy(), start.bias.detach().double().numpy().copy()
    moving_w, moving_b, step, steps = np.zeros_like(w), np.zeros_like(b), 0, 3 * math.ceil(37 / 8)
    order = Order(np.arange(37), 7, 8, drop_last=False)
    while step < steps:
        _, rows = order.at(step)
        scores = x[rows] @ w.T + b
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), y[rows]] -= 1
        lr = 0.3 / 2 * (1 + math.cos(math.pi * step / steps))
        moving_w = 0.9 * moving_w + p.T @ x[rows] / len(rows) + 0.01 * w
        moving_b = 0.9 * moving_b + p.mean(0)
        w, b, step = w - lr * moving_w, b - lr * moving_b, step + 1
    assert seen == [0, 1, 2, 3] and found.weight.dtype == torch.float64
    np.testing.assert_allclose(found.weight.detach(), w, rtol=1e-10)
    np.testing.assert_allclose(found.bias.detach(), b, rtol=1e-10)


def test_seeds_give_other_starts_and_orders_and_the_same_again():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=draw), torch.arange(20) % 2
    before = torch.get_rng_state()
    first, again, other = (train_classifier(x, y, 2, Recipe(2, 8, 0.1), seed).weight for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(before), "what is drawn elsewhere does not depend on it"


def test_heads_have_the_shapes_and_starts_of_pytorch():
    head = mlp_head(16, 3, 0)
    assert [tuple(p.shape) for p in head.parameters()] == [(16, 16), (16,), (3, 16), (3,)]
    assert [type(part).__name__ for part in head] == ["Linear", "ReLU", "Linear"]
    assert mlp_head(16, 3, 0, hidden=5)[2].in_features == 5
    weights = linear_head(400, 50, 0).weight.detach()
    assert float(weights.abs().max()) < 0.05 and float(weights.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)


def test_a_whole_network_steps_as_pytorch_would_with_a_rate_of_its_own():
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.rand(6, 3, 16, 16, generator=draw), torch.arange(6) % 3
    encoder = tiny()
    network = Network(encoder, mlp_head(32, 3, 0))
    plain = Network(encoder, mlp_head(32, 3, 0)).train()
    F.cross_entropy(plain(images), labels).backward()
    train(network, [(images, labels)], 1, Recipe(1, 6, lr=0.5, weight_decay=0.1, backbone_lr=0.01))
    for (name, after), before in zip(network.named_parameters(), plain.parameters(), strict=True):
        rate = 0.5 if name.startswith("head") else 0.01
        decay = 0.1 * before if before.ndim > 1 else 0
        torch.testing.assert_close(after, before - rate * (before.grad + decay), rtol=1e-5, atol=1e-6)
    assert network.encoder.backbone.bn1.running_mean.equal(plain.encoder.backbone.bn1.running_mean)


def data_of(images: Path, source: Path, *more: str) -> EvaluationData:
    schema = transfer.TransferEvaluation
    return EvaluationData(load(schema, [*given("transfer", images), f"source=[{source}]", *more]), CPU, None)


def test_with_rates_of_zero_weights_stay_and_the_encoder_is_never_touched(images, encoders):
    data, encoder = data_of(images, encoders / "e0"), tiny()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    task = Task("both", (0, 1))
    settings = (encoder, linear_head(32, 2, 0), data, data.train.indices, task)
    network = train_network(*settings, Recipe(1, 8, 0.0), 0, RandomCropConfig())
    assert all(torch.equal(p, q) for p, q in zip(network.encoder.parameters(), encoder.parameters(), strict=True))
    x = torch.rand(4, 3, 16, 16)
    network.train(), encoder.train()
    assert network.encoder(x).features.equal(encoder(x).features)
    encoder.load_state_dict(before)
    network = train_network(*settings, Recipe(1, 8, 0.1), 0, RandomCropConfig())
    assert all(before[name].equal(tensor) for name, tensor in encoder.state_dict().items())
    assert not network.encoder.backbone.conv1.weight.equal(before["backbone.conv1.weight"])
    assert not network.encoder.backbone.bn1.sync and encoder.backbone.bn1.sync


@pytest.mark.parametrize(("most", "sizes"), [(24, [24]), (256, [24]), (23, [12, 12]), (7, [6] * 4), (2, [2] * 12)])
def test_batches_of_an_epoch_have_one_size(images, most, sizes):
    catalog = open_catalog(DataConfig(root=str(images)), "train")
    shown = RandomCropConfig().augment(16), LoaderConfig(threads=1), CPU
    with drawn_batches(catalog, catalog.indices, most, 0, *shown) as (batches, steps):
        first = [next(batches) for _ in range(steps)]
    assert [len(batch.labels) for batch in first] == sizes
    assert sorted(torch.cat([batch.index for batch in first]).tolist()) == catalog.indices.tolist()


def test_no_batch_has_one_image(images):
    catalog = open_catalog(DataConfig(root=str(images)), "train")
    shown = RandomCropConfig().augment(16), LoaderConfig(threads=1), CPU
    with drawn_batches(catalog, catalog.indices[:3], 2, 0, *shown) as (batches, steps):
        assert steps == 1 and len(next(batches).labels) == 2


def test_a_loss_that_is_not_finite_is_a_line_that_names_the_rate():
    with pytest.raises(NotFinite, match=r"a classifier in training is not finite in epoch \d: lower lr=1e\+30"):
        train_classifier(torch.rand(8, 4) * 1e5, torch.arange(8) % 2, 2, Recipe(5, 4, 1e30), 0)


# ---------------------------------------------------------------- figures over seeds


def test_spreads_are_means_and_sample_deviations():
    assert spread([3.0]) == Spread(3.0, None, 1) and str(spread([3.0])) == "3.00"
    mean, sd, n = spread([1.0, 2.0, 6.0])
    assert (mean, n) == (3.0, 3) and sd == pytest.approx(np.std([1, 2, 6], ddof=1), rel=1e-12)
    runs = [{"a": a, "b": b, "accuracy": v} for a, b, v in (("x", 1, 1.0), ("y", 1, 2.0), ("x", 1, 3.0), ("x", 2, 5.0))]
    assert spreads(runs, "a", "b") == {
        "x": {1: Spread(2.0, math.sqrt(2), 2), 2: Spread(5.0, None, 1)},
        "y": {1: Spread(2.0, None, 1)},
    }
    assert aligned([["%", "long name"], ["one", "1.0"]]) == ["%    long name", "one        1.0"]


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ("[[cat,cow]]", r"class 'cow' is none of the 2 in '.*' \(cat, dog\): give labels from 0 to 1, or names"),
        ("[[0,2]]", "class 2 is none of the 2"),
        ("[[cat]]", "has 1 class: there is nothing to tell apart"),
        ("[[]]", "has 0 class"),
        ("[[cat,0]]", "has a class twice: give each once"),
        ("[[0,1],[cat,dog]]", r"task \[0, 1\] is given 2 times: give each once"),
        ("paper", "tasks=paper are of CIFAR-100's labels up to 99, and '.*' has 2 classes"),
        ("random:1", "1 disjoint 5-way tasks need 5 classes, and '.*' has 2"),
        ("random:0", "should be paper, all, random:N or lists of classes"),
        ("some", "should be paper, all, random:N or lists of classes"),
    ],
)
def test_tasks_that_the_data_cannot_give_are_a_line(images, encoders, tasks, complaint):
    data = data_of(images, encoders / "e0", f"tasks={tasks}")
    with pytest.raises(UsageError, match=complaint):
        transfer.evaluate([], data, data.config, Parts(None))


def test_a_class_without_a_validation_image_is_a_line(images, encoders, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    shutil.rmtree(tmp_path / "images/val/dog")
    data = data_of(tmp_path / "images", encoders / "e0", "tasks=all")
    with pytest.raises(UsageError, match=r"val' has no image of class 1 \('dog'\): leave it out, or add some"):
        transfer.evaluate([], data, data.config, Parts(None))


def test_tasks_have_labels_of_their_own(images):
    catalog = open_catalog(DataConfig(root=str(images)), "val")
    (task,) = tasks_of([("dog", 0)], catalog)
    assert task.classes == (1, 0) and task.relabelled(torch.tensor([0, 1, 1])).tolist() == [1, 0, 0]
    assert len(Task("", (1,)).members(catalog, catalog.indices)) == 6


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("seeds=[]", "at least 1"),
        ("seeds=[1,1]", "seed 1: should be 0 or more, and given once"),
        ("seeds=[-1]", "seed -1: should be 0 or more"),
        ("crop.scale=[0.5,0.1]", "smallest"),
        ("train_batch=1", "greater than or equal to 2"),
    ],
)
def test_settings_that_make_no_sense_are_a_line(images, encoders, setting, complaint):
    with pytest.raises(UsageError, match=complaint):
        data_of(images, encoders / "e0", setting)


def test_what_a_frozen_backbone_does_not_read_is_said(images, encoders):
    said = []
    load(transfer.TransferEvaluation, [*given("transfer", images), "source=[x]", "backbone_lr=1"], say=said.append)
    assert said == ["WARNING: backbone_lr=1.0 is given and not used: backbone=frozen"]


# ---------------------------------------------------------------- the evaluation


def test_rates_are_the_papers_by_what_the_encoder_was_trained_with(images, encoders):
    config = data_of(images, encoders / "e0").config
    nt_xent, supervised = {"objective": "nt_xent"}, {"objective": "cross_entropy"}
    trained = [{}, {"terms": {"a": nt_xent}}, {"terms": {"a": supervised}}, {"terms": {"a": supervised, "b": nt_xent}}]
    rates = [transfer._lr(Subject("", "", "", settings), config)[0] for settings in trained]
    assert rates == [0.05, 0.05, 0.2, 0.05]
    assert transfer._lr(Subject("", "", "", {}), config.model_copy(update={"lr": 3.0})) == (3.0, "3")


def both_ways(configs: list[transfer.TransferEvaluation]) -> list[tuple[transfer.Transfer, list[bytes]]]:
    """What is found of each, and the files."""
    parts, answers = Parts(None), []
    for config in configs:
        found = found_by(config, parts)
        answers.append((found, [Path(one["path"]).read_bytes() for one in found.trajectories]))
    return answers


def test_one_rank_finds_what_two_find(images, encoders, tmp_path):
    more = [f"source=[{encoders / 'e0'}]", "tasks=[[cat,dog]]", "epochs=1", f"output={tmp_path / 'o.json'}"]
    configs = [
        load(transfer.TransferEvaluation, given("transfer", images, *more, f"backbone={backbone}"))
        for backbone in ("frozen", "trained")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    alone = both_ways(configs)
    torch.set_num_threads(threads)
    assert run_ranks(2, both_ways, configs) == [alone, alone]
    assert [run["seed"] for run in alone[1][0].runs] == [0, 1] and alone[0][1] != alone[1][1]


def test_the_command_leaves_a_table_a_picture_and_trajectories_and_does_nothing_twice(
    images, encoders, tmp_path, capsys, monkeypatch
):
    for name in ("e0", "e1"):
        shutil.copytree(encoders / name, tmp_path / name)
    module = script("eval")
    arguments = given("transfer", images, f"source=[{tmp_path / 'e0'},{tmp_path / 'e1'}]", "tasks=[[dog,cat]]")
    arguments.append("names=[both,both]")
    config = load(module.schema_of("transfer"), arguments, module.of_run)
    assert module.evaluate(config) == 0
    said = capsys.readouterr().out
    assert "both: n = 4, lr 0.05 (the paper's, " in said and " ± " in said
    table = json.loads((tmp_path / "eval-transfer.json").read_text())
    values = [run["accuracy"] for run in table["runs"]]
    assert table["accuracy"]["both"]["[1, 0]"] == spread(values)._asdict()
    assert len(table["epochs"]["both"]["[1, 0]"]) == 3 and table["chance"] == {"[1, 0]": 50.0}
    assert table["train"]["images"] == 24 and (tmp_path / "eval-transfer.png").stat().st_size > 1000
    kept = read_trajectories(tmp_path / "e1" / FILE)
    assert [(one.task, one.seed, one.classes) for one in kept] == [("[1, 0]", seed, ("dog", "cat")) for seed in (0, 1)]
    assert kept[0].probabilities.shape == (3, 12, 2) and kept[0].probabilities.dtype == torch.float16
    hits = kept[1].probabilities[-1].argmax(1) == kept[1].labels
    assert 100 * float(hits.float().mean()) == pytest.approx(values[3])
    assert table["trajectories"][1]["bytes"] == (tmp_path / "e1" / FILE).stat().st_size
    assert f"{table['trajectories'][1]['bytes']:,} bytes: {tmp_path / 'e1' / FILE}" in said

    monkeypatch.setattr(transfer, "train_classifier", None)  # it comes to no work
    monkeypatch.setattr(EvaluationData, "all_features", None)
    assert module.evaluate(config) == 0
    again = json.loads((tmp_path / "eval-transfer.json").read_text())
    assert all(again[key] == table[key] for key in table.keys() - {"seconds", "date"})
    later = read_trajectories(tmp_path / "e1" / FILE)
    assert all(one.probabilities.equal(other.probabilities) for one, other in zip(kept, later, strict=True))


def test_trajectories_go_beside_the_result_where_it_goes_elsewhere_or_they_would_meet(images, tmp_path, encoders):
    (tmp_path / "both").mkdir()
    for name in ("e0", "e1"):
        for ending in ("safetensors", "json"):
            shutil.copy(encoders / name / f"encoder.{ending}", tmp_path / "both" / f"{name}.{ending}")
    files = [str(tmp_path / "both" / f"{name}.safetensors") for name in ("e0", "e1")]

    def places(*more: str) -> list[str]:
        config = load(transfer.TransferEvaluation, given("transfer", images, *more))
        return [str(Path(place).relative_to(tmp_path)) for place in transfer._places(subjects_of(config), config)]

    folder = "both/eval-transfer-trajectories"
    assert places(f"source=[{','.join(files)}]") == [f"{folder}/e0/{FILE}", f"{folder}/e1/{FILE}"]
    assert places(f"source=[{files[0]}]") == [f"both/{FILE}"]
    assert places(f"source=[{files[0]}]", f"output={tmp_path}/o.json") == [f"o-trajectories/e0/{FILE}"]
    (tmp_path / "both" / FILE).mkdir()  # what cannot be written over
    assert places(f"source=[{files[0]}]") == [f"{folder}/e0/{FILE}"]


def test_the_picture_begins_at_no_percent_and_names_each_method():
    runs = [
        {"method": method, "task": task, "seed": seed, "accuracy": 50.0 + seed + len(method)}
        for method in ("a", "bb")
        for task in ("[0, 1]", "[2, 3]")
        for seed in (0, 1)
    ]
    epochs = {m: {t: [Spread(20.0, 1.0, 2)] * 3 for t in ("[0, 1]", "[2, 3]")} for m in ("a", "bb")}
    chance = {"[0, 1]": 50.0, "[2, 3]": 50.0}
    found = transfer.Transfer(spreads(runs, "method", "task"), epochs, chance, {}, runs, [])
    left, right = transfer.figure(found).axes
    assert left.get_ylim()[0] == right.get_ylim()[0] == 0 and "(%)" in left.get_ylabel()
    assert {"a", "bb", "chance"} == {text.get_text() for text in right.get_legend().get_texts()}
    assert [label.get_text() for label in left.get_xticklabels()] == ["[0, 1]", "[2, 3]"]
