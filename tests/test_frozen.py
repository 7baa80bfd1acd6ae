"""Heads trained on a frozen backbone: it stays to the bit, in every way to train, and the run resumes and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fasttrain import distributed, engine
from fasttrain.config import doubts, load, resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.export import export, load_encoder
from fasttrain.models.reference import freeze_backbone
from fasttrain.nonfinite import Gate
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.views import ViewedTermConfig
from tests.ranks import run_ranks
from tests.test_launch import metrics, pretrain_here, script, weights_of
from tests.test_views import IMAGES, make_batch, make_encoder, step_of

HEADS = ("encoder.backbone.fc.", "encoder.head.", "encoder.predictor.")
ATTACK = {"kind": "attack", "attack": {"name": "pgd", "steps": 2, "norm": "l2", "eps_255": 127.5}}
TERMS: dict[str, dict[str, Any]] = {
    "slf": {"objective": "cross_entropy"},
    "alf": {"objective": "trades", "view": ATTACK},
    "simclr": {"objective": "nt_xent"},
}


class Case(NamedTuple):
    """A way to train heads."""

    term: str
    optimizer: str = "sgd"
    stage: int = 0


def trained(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Weights and buffers after two steps of each case, in training mode."""
    distributed.initialize("cpu")
    world, rank = distributed.world_size(), distributed.rank()
    part = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    found = []
    for case in cases:
        encoder = make_encoder()
        freeze_backbone(encoder)
        step = step_of(resolve(ViewedTermConfig, TERMS[case.term]), encoder)
        settings = OptimizerConfig(name=case.optimizer, lr=0.1, weight_decay=0.1, trust_coefficient=0.1)
        optimizer = build_optimizer(settings, step, case.stage, torch.device("cpu"))
        train = engine.TrainConfig(batch=IMAGES, zero_stage=case.stage, precision="fp32")
        trainer = engine.initialize(step, optimizer, train)
        trainer.train()
        gate = Gate(trainer)
        for number in range(2):
            whole = make_batch(number, views=2 if case.term == "simclr" else 1)
            loss, _ = trainer(Batch(whole.images[:, part], whole.labels[part], whole.index[part]))
            trainer.backward(loss)
            gate.step()
        found.append({name: value.detach().clone() for name, value in trainer.module.state_dict().items()})
    return found


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The heads, and what is frozen."""
    heads = {name: value for name, value in state.items() if name.startswith(HEADS)}
    return heads, {name: value for name, value in state.items() if name not in heads and not name.startswith("views.")}


CASES = [Case("alf"), Case("slf", "lars"), Case("simclr", "adamw")]


def test_only_heads_move_by_any_optimizer_in_one_process_and_two():
    before = {f"encoder.{name}": value for name, value in make_encoder().state_dict().items()}
    alone = trained(CASES)
    for case, state in zip(CASES, alone, strict=True):
        heads, frozen = split(state)
        assert all(torch.equal(value, before[name]) for name, value in frozen.items()) and len(frozen) > 100, case
        used = "encoder.head.0.weight" if case.term == "simclr" else "encoder.backbone.fc.weight"
        assert not torch.allclose(heads[used], before[used], atol=1e-4), case
    expected, _ = split(alone[0])
    for (state,) in run_ranks(2, trained, [Case("alf", stage=2)], timeout=120):
        heads, frozen = split(state)
        assert all(torch.equal(value, before[name]) for name, value in frozen.items())
        for name, value in expected.items():
            torch.testing.assert_close(heads[name], value, rtol=1e-3, atol=1e-5)


def test_a_step_of_the_head_is_that_of_logistic_regression_on_the_features():
    """No graph and no decay of the backbone; its BatchNorm as in evaluation, while all trains."""
    encoder, batch = make_encoder(), make_batch(views=1)
    with torch.no_grad():
        features = make_encoder().eval()(batch.images[0]).features
    freeze_backbone(encoder)
    step = step_of(resolve(ViewedTermConfig, TERMS["slf"]), encoder).train()
    optimizer = build_optimizer(OptimizerConfig(name="sgd", weight_decay=0.1), step, 0, torch.device("cpu"))
    assert {p for group in optimizer.param_groups for p in group["params"]} == {
        p for name, p in step.named_parameters() if name.startswith(HEADS)
    }
    loss, _ = step(batch)
    loss.backward()
    plain = torch.nn.Linear(features.shape[1], 3)
    plain.load_state_dict(encoder.backbone.fc.state_dict())
    torch.nn.functional.cross_entropy(plain(features), batch.labels).backward()
    torch.testing.assert_close(encoder.backbone.fc.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for name, p in step.named_parameters() if not name.startswith(HEADS))
    assert not encoder(batch.images[0]).features.requires_grad


PROTOCOL = [
    "augment.views=1",
    "model.classes=2",
    "model.head.layers=0",
    "model.frozen=true",
    "evaluate.every_epochs=0",
    "optimizer.lr=0.1",
    "optimizer.lr_scaling=none",
    "optimizer.schedule=steps",
    "optimizer.milestones=[1,1.5]",
    "run.save_every=3",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a run leaves of an encoder that a run of ``pretrain_here`` may begin from."""
    folder, encoder = tmp_path_factory.mktemp("source"), make_encoder(width=0.0625)
    export(encoder, folder)
    return folder


ALF = ["terms.alf.objective=cross_entropy", "terms.alf.view.kind=attack", "terms.alf.view.attack.name=pgd"]


class Finished(NamedTuple):
    """A head trained on attacked images, from weights that are gone."""

    folder: Path
    arguments: list[str]


@pytest.fixture(scope="module")
def finished(images, source, tmp_path_factory) -> Finished:
    place = tmp_path_factory.mktemp("alf")
    gone = Path(shutil.copytree(source, place / "source"))
    arguments = [*PROTOCOL, *ALF, f"data.root={images}", f"model.weights={gone}"]
    assert pretrain_here(*arguments, f"run.dir={place / 'run'}") == 0
    shutil.rmtree(gone)
    return Finished(place / "run", arguments)


def test_a_run_trains_its_head_and_exports_the_backbone_it_began_with(source, finished):
    ours, theirs = (load_file(str(folder / "encoder.safetensors")) for folder in (finished.folder, source))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, last = weights_of(finished.folder, 3), weights_of(finished.folder, 6)
    moved = {name for name in last if not torch.equal(first[name], last[name])}
    assert moved == {"encoder.backbone.fc.weight", "encoder.backbone.fc.bias", "views.alf.calls"}
    rates = [line["lr"] for line in metrics(finished.folder) if "lr" in line]
    assert rates == pytest.approx([0.1] * 2 + [0.01] + [0.001] * 3)


def test_what_it_leaves_can_be_read_whole_or_from_its_checkpoint(source, finished, tmp_path):
    assert json.loads((finished.folder / "encoder.json").read_text())["model"]["frozen"] is True
    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    (copy / "encoder.safetensors").unlink()
    theirs = load_encoder(str(source)).backbone.state_dict()
    for folder in (finished.folder, copy):
        weights = load_encoder(str(folder)).backbone.state_dict()
        assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


def test_it_goes_on_bit_for_bit_and_without_its_source(finished, tmp_path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints/step-00000006")
    assert pretrain_here(*finished.arguments, f"run.dir={folder}") == 0
    ours, theirs = weights_of(folder, 6), weights_of(finished.folder, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.weights=null"],
            r"model: frozen=true without weights would keep a random backbone: set model\.weights",
        ),
        (["terms.alf.view.attack.batchnorm=train"], r"terms\.alf\.view\.attack\.batchnorm=train: .* set it to eval"),
        (["model.classes=0"], r"model\.classes=0: cross_entropy needs it, set model\.classes"),
        (
            ["optimizer.milestones=[1,2]"],
            r"optimizer\.milestones=\[1, 2\]: 2 is not before the run's end, after 2 epochs",
        ),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(images, source, tmp_path, arguments, message):
    given = [*PROTOCOL, *ALF, f"data.root={images}", f"model.weights={source}", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UsageError, match=message) as caught:
        pretrain_here(*given, *arguments)
    assert "\n" not in str(caught.value)


def test_measuring_what_stays_as_it_is_is_doubted():
    schema, given = script("pretrain").PretrainConfig, ["model.weights=x", "model.frozen=true"]
    assert doubts(load(schema, [*given, "evaluate.every_epochs=2"]))[0].startswith("evaluate.every_epochs=2: the kNN")
    assert not doubts(load(schema, [*given, "evaluate.every_epochs=0"]))
