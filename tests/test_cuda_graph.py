"""Recorded passes train as the usual ones do, bit for bit; a stand-in records on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from fasttrain import cuda_graph, engine
from fasttrain.attacks import AttackConfig
from fasttrain.cuda_graph import Recorded, Recorder, Usual
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.nonfinite import Gate
from fasttrain.objectives import build_objective, build_one_sided
from fasttrain.objectives.terms import PenaltyConfig, TermConfig
from fasttrain.step import Term
from fasttrain.views import adversarial
from tests.ranks import run_ranks
from tests.test_failures import GLOBAL, Images, fit, settings
from tests.test_gate import NT_XENT, fused, simclr

STEPS = 8


def tensors(found) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found or ()
    return [t for part in parts for t in tensors(part)]


class StandIn(Recorder):
    """Does the work again at each replay, and puts what comes of it where the first result lies."""

    replays = 0

    def record(self, work):
        first = work()

        def replay() -> None:
            StandIn.replays += 1
            kept, found = tensors(first), tensors(work())
            for ours, theirs in zip([t.detach().clone() for t in found], kept, strict=True):
                theirs.data.copy_(ours)

        return first, replay


class Forgetful(StandIn):
    """Its replays do nothing."""

    def record(self, work):
        first, _ = super().record(work)
        for kept in tensors(first):
            kept.data.zero_()
        return first, lambda: None


class Unable(Recorder):
    def record(self, work):
        raise RuntimeError("operation not permitted when\n stream is capturing")


def with_recorder(monkeypatch, recorder: type[Recorder], choice: str = "auto") -> list[str]:
    """Let training record here; the lines that it says."""
    said: list[str] = []

    def make(trainer, config, say):
        config = config.model_copy(update={"cuda_graph": choice})
        return Recorded(Usual(trainer), trainer, config, recorder(), said.append)

    monkeypatch.setattr(engine, "make_passes", make)
    StandIn.replays = 0
    return said


KINDS = {
    "plain": (simclr(), {}),
    "accumulation": (simclr(), {"accumulation": 2, "clip": 0.1}),
    "penalty": (simclr(penalty=PenaltyConfig(weight=0.5)), {}),
    "attack": (simclr(lambda _: adversarial(AttackConfig(name="pgd", steps=1), build_one_sided(NT_XENT), 0)), {}),
    "fp16": (simclr(), {"precision": "fp16"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_passes_train_as_the_usual_ones(tmp_path, monkeypatch, kind):
    term, train = KINDS[kind]
    train = {"steps": STEPS} | train
    _, seen, usual = fit(settings(tmp_path / "usual", train), term)
    said = with_recorder(monkeypatch, StandIn)
    _, images, recorded = fit(settings(tmp_path / "recorded", train), term)
    assert all(torch.equal(usual[name], recorded[name]) for name in usual) and images.seen == seen.seen
    micro_batches = (STEPS - 1) * train.get("accumulation", 1) - cuda_graph.WARM_UP // train.get("accumulation", 1)
    assert not said and StandIn.replays >= 2 * (micro_batches - train.get("accumulation", 1))
    losses = [(tmp_path / name / "metrics.jsonl").read_text().count('"loss"') for name in ("usual", "recorded")]
    assert losses[0] == losses[1] == STEPS


class Spoiled(Images):
    """One step's images are NaN."""

    def iterate(self, start=0):
        for position, batch in enumerate(super().iterate(start), start):
            yield batch._replace(images=batch.images * torch.nan) if position == STEPS - 2 else batch


@pytest.mark.parametrize("defers", [False, True])
def test_a_step_that_is_not_finite_is_undone_likewise(tmp_path, monkeypatch, defers):
    monkeypatch.setattr("tests.test_failures.Images", Spoiled)
    monkeypatch.setattr(engine, "Gate", functools.partial(Gate, defers=defers))
    monkeypatch.setattr(engine, "build_optimizer", fused)
    train = {"steps": STEPS, "on_non_finite": "skip"}
    _, _, usual = fit(settings(tmp_path / "usual", train), simclr())
    with_recorder(monkeypatch, StandIn)
    _, _, recorded = fit(settings(tmp_path / "recorded", train), simclr())
    assert all(torch.equal(usual[name], recorded[name]) for name in usual)
    bundles = [(folder / "weights.safetensors").read_bytes() for folder in sorted(tmp_path.glob("*/not-finite-*"))]
    assert len(bundles) == 2 and bundles[0] == bundles[1] and StandIn.replays > 0


@pytest.mark.parametrize(
    ("recorder", "reason"), [(Unable, "not permitted when stream is capturing"), (Forgetful, "replayed gradients are")]
)
def test_what_cannot_be_recorded_runs_as_usual_or_stops(tmp_path, monkeypatch, recorder, reason):
    train = {"steps": STEPS}
    _, _, usual = fit(settings(tmp_path / "usual", train), simclr())
    said = with_recorder(monkeypatch, recorder)
    _, _, found = fit(settings(tmp_path / "auto", train), simclr())
    assert all(torch.equal(usual[name], found[name]) for name in usual)
    assert len(said) == 1 and said[0].startswith("no CUDA graphs of whole passes: ") and reason in said[0]
    with_recorder(monkeypatch, recorder, "on")
    with pytest.raises(UsageError, match=f"train.cuda_graph=on: .*{reason}"):
        fit(settings(tmp_path / "on", train), simclr())


class Growing(Images):
    """From the sixth step on the images are larger."""

    def iterate(self, start=0):
        for position, batch in enumerate(super().iterate(start), start):
            yield Batch(batch.images.repeat(1, 1, 1, 1, 2), *batch[1:]) if position > 5 else batch


def test_another_kind_of_batch_or_mode_gets_a_recording_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_failures.Images", Growing)

    def change_of_mode(run, step, module):
        if step == 11:
            module.encoder.head.eval()

    train = {"steps": 16}
    _, _, usual = fit(settings(tmp_path / "usual", train), simclr(), change_of_mode)
    said = with_recorder(monkeypatch, StandIn)
    _, _, recorded = fit(settings(tmp_path / "recorded", train), simclr(), change_of_mode)
    assert all(torch.equal(usual[name], recorded[name]) for name in usual)
    trials, steps = 3 * 2, 16 - 3 * cuda_graph.WARM_UP
    assert not said and StandIn.replays == trials + 2 * steps


def test_asked_for_in_vain_it_stops_before_the_first_step(tmp_path):
    with pytest.raises(UsageError, match=r"train\.cuda_graph=on: there is no GPU; use auto"):
        fit(settings(tmp_path, {"cuda_graph": "on"}), simclr())


def test_reasons_are_known_before_a_step():
    module, gpu = torch.nn.Linear(1, 1), torch.device("cuda")
    of = functools.partial(engine.TrainConfig, batch=GLOBAL)
    assert cuda_graph.why_not(module, of(), gpu) is None
    assert "train.zero_stage=1" in cuda_graph.why_not(module, of(zero_stage=1), gpu)
    assert "train.loss_over=batch" in cuda_graph.why_not(module, of(accumulation=2, loss_over="batch"), gpu)
    module.checkpoint_activations = True
    assert "model.checkpoint_activations" in cuda_graph.why_not(module, of(), gpu)
    assert "no GPU" in cuda_graph.why_not(module, of(), torch.device("cpu"))


def test_losses_that_meet_other_ranks_are_not_recorded(tmp_path, monkeypatch):
    counts = iter(range(100))
    monkeypatch.setattr(cuda_graph.distributed, "exchanges", lambda: next(counts))
    said = with_recorder(monkeypatch, StandIn)
    fit(settings(Path(tmp_path), {"steps": STEPS}), simclr())
    assert len(said) == 1 and "between ranks" in said[0] and not StandIn.replays


def on_two_ranks(folder: str) -> list[torch.Tensor]:
    """Weights of a run whose losses and BatchNorms stay within a rank, as usual and recorded."""
    found = []
    for name, choose in (("usual", engine.make_passes), ("recorded", None)):
        if choose is None:
            engine.make_passes = lambda *given: Recorded(Usual(given[0]), *given[:2], StandIn(), given[2])
        term = lambda encoder: Term("loss", build_objective(TermConfig(objective="cross_entropy")))  # noqa: E731
        _, _, state = fit(settings(Path(folder) / name, {"steps": STEPS}), term, sync_bn=False)
        found.append(torch.cat([v.flatten() for v in state.values() if v.is_floating_point()]))
    return [*found, torch.tensor(StandIn.replays)]


def test_ranks_average_recorded_gradients(tmp_path):
    ranks = run_ranks(2, on_two_ranks, str(tmp_path))
    for usual, recorded, replays in ranks:
        assert torch.equal(usual, recorded) and replays == 2 * (STEPS - cuda_graph.WARM_UP + 1)


@pytest.mark.parametrize("train", [{"zero_stage": 1}, {"accumulation": 2, "loss_over": "batch"}])
def test_an_attack_is_recorded_where_the_whole_cannot_be(tmp_path, monkeypatch, train):
    train = {"steps": STEPS} | train
    attack = AttackConfig(name="pgd", steps=1)

    def term(_):
        labels = TermConfig(objective="cross_entropy")
        view = adversarial(attack, build_one_sided(labels), 0, 0, train.get("accumulation", 1))
        alone = Term("attacked", build_objective(labels), 1.0, view)
        return [alone] if "zero_stage" in train else [Term("whole", build_objective(NT_XENT)), alone]

    _, _, usual = fit(settings(tmp_path / "usual", train), term, sync_bn=False)

    def make(trainer, config, say):
        cuda_graph.record_attacks(trainer.module, StandIn, say)
        return Usual(trainer)

    monkeypatch.setattr(engine, "make_passes", make)
    StandIn.replays = 0
    _, _, recorded = fit(settings(tmp_path / "recorded", train), term, sync_bn=False)
    assert all(torch.equal(usual[name], recorded[name]) for name in usual)
    assert StandIn.replays == 1 + train["steps"] * train.get("accumulation", 1) - cuda_graph.WARM_UP
