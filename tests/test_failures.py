"""Steps that are not finite, signals, interruptions: every rank decides the same, and nothing else moves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import checkpoint, distributed, engine
from fasttrain.attacks import AttackConfig
from fasttrain.checkpoint import files
from fasttrain.checkpoint.state import snapshot
from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.data.damage import BadImages
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.nonfinite import STEP, read_bundle
from fasttrain.objectives import build_one_sided, cross_entropy
from fasttrain.objectives.terms import PenaltyConfig, TermConfig, build_objective
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.run import Run, RunConfig, read_metrics
from fasttrain.step import Term, TrainStep
from fasttrain.stop import ECHO, SIGNALS, StopRequest, until_stopped
from fasttrain.views import adversarial
from tests.ranks import run_ranks
from tests.test_engine import largest_difference

STEPS, GLOBAL, SIDE, BAD = 5, 8, 8, 2


class Settings(Config):
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0, warmup_steps=2
    )
    train: engine.TrainConfig = engine.TrainConfig(batch=GLOBAL, steps=STEPS, precision="fp32")


def settings(folder: Path | str, train: dict[str, Any] | None = None, **run: Any) -> Settings:
    base = {"batch": GLOBAL, "steps": STEPS, "precision": "fp32"}
    return Settings(
        run=RunConfig(dir=str(folder), log_every=1, save_every=2, **run),
        train=engine.TrainConfig(**base | (train or {})),
    )


class Images:
    """This rank's part of random images; ``index`` tells the step."""

    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.seen, self.bad = accumulation, [], BadImages(0, GLOBAL, "")

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        world, rank, size = distributed.world_size(), distributed.rank(), GLOBAL // self.accumulation
        position = start
        while True:
            generator = torch.Generator().manual_seed(position)
            images = torch.rand(2, size, 3, SIDE, SIDE, generator=generator)
            labels, index = torch.randint(0, 3, (size,), generator=generator), position * size + torch.arange(size)
            part = slice(rank * size // world, (rank + 1) * size // world)
            self.seen.append(index[part].tolist())
            yield Batch(images[:, part], labels[part], index[part])
            position += 1

    def close(self) -> None: ...


def poisoned(kind: str):
    """Cross-entropy whose loss, or whose gradient alone, is NaN on the last rank in one step."""
    objective = cross_entropy()

    def with_poison(encoded, batch: Batch):
        loss = objective(encoded, batch)
        if int(batch.index[0]) // GLOBAL != BAD or distributed.rank() != distributed.world_size() - 1:
            return loss
        return loss * torch.nan if kind == "loss" else loss + (0 * encoded.logits.sum()).sqrt()

    return with_poison


def step_of(term: Term, **model: Any) -> TrainStep:
    torch.manual_seed(0)
    head = HeadConfig(width=8, out=8)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=head, classes=3, **model))
    terms = term(encoder) if callable(term) else term
    return TrainStep(encoder, terms if isinstance(terms, list) else [terms])


def fit(
    config: Settings,
    term: Any,
    progress=lambda run, step, engine: None,
    evaluation: engine.Callback | None = None,
    **model: Any,
) -> tuple[bool, Images, dict]:
    """Train as a script does; ``progress`` is called after each step. Gives (finished, images, state)."""
    device = distributed.initialize("cpu")
    module, images = step_of(term, **model), Images(config.train.accumulation)
    plan = engine.Plan(config.train.steps, STEPS, lambda step: 0.01 / (step + 1))
    with Run(config.run) as run:
        before = run.progress

        def stepped(step: int) -> None:
            before(step)
            progress(run, step, module)

        run.progress = stepped
        evaluations = [evaluation] if evaluation else []
        finished = engine.fit(module, config, plan, images, "data", run, device, evaluations)
    return finished, images, {k: v.clone() for k, v in module.state_dict().items()}


def skipping(folder: str, stages: tuple[int, ...]) -> list[tuple[bool, list[bool]]]:
    """For each stage and kind of poison: whether the run finished, and which of steps 1, 2, … changed anything."""
    results = []
    for stage in stages:
        for kind in ("loss", "gradient"):
            states = {}

            def note(run: Run, step: int, module: torch.nn.Module, states=states) -> None:
                states[step] = {k: v.clone() for k, v in module.state_dict().items()}

            where = Path(folder) / f"{stage}-{kind}"
            config = settings(where, {"zero_stage": stage, "on_non_finite": "skip", "max_skipped": 1})
            finished, _, _ = fit(config, Term("loss", poisoned(kind)), note)
            moved = [any(not torch.equal(states[s][k], states[s + 1][k]) for k in states[s]) for s in range(1, STEPS)]
            results.append((finished, moved))
    return results


def test_a_step_that_is_not_finite_is_skipped_and_moves_nothing(tmp_path):
    for finished, moved in skipping(str(tmp_path), (0, 1)):
        assert finished and moved == [step != BAD for step in range(1, STEPS)]


@pytest.mark.faults
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path):
    for rank in run_ranks(2, skipping, str(tmp_path), (0, 1, 2), timeout=400):
        for finished, moved in rank:
            assert finished and moved == [step != BAD for step in range(1, STEPS)]
    for folder in tmp_path.iterdir():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1]
        assert ["loss" in line for line in lines] == [step != BAD for step in range(STEPS)]
        (bundle,) = folder.glob("not-finite-*")
        report = json.loads((bundle / "step.json").read_text())
        assert report["step"] == BAD and [i for r in report["ranks"] for i in r["index"][0]] == list(range(16, 24))


@pytest.mark.parametrize(("kind", "message"), [("loss", "the loss of step 2 is nan"), ("gradient", "is not finite")])
def test_the_default_is_to_stop_with_the_evidence(tmp_path, kind, message):
    with pytest.raises(UsageError, match=rf"{message}.*replay\.py .*warmup_steps"):
        fit(settings(tmp_path), Term("loss", poisoned(kind)))
    (bundle,) = tmp_path.glob("not-finite-*")
    assert {path.name for path in bundle.iterdir()} == {"step.json", "weights.safetensors", "random.safetensors"}


BUNDLES = [b"{}", b"5", b"\xff", b"[" * 100_000, b'{"step": "2"}']


@pytest.mark.parametrize("content", [*BUNDLES, *("step", "schema", "config", "ranks")], ids=str)
def test_a_bundle_that_is_not_whole_is_one_line(tmp_path, content):
    with pytest.raises(UsageError, match="replay"):
        fit(settings(tmp_path), Term("loss", poisoned("loss")))
    (bundle,) = tmp_path.glob("not-finite-*")
    report = json.loads((bundle / STEP).read_text())
    assert read_bundle(bundle)[0] == report
    if isinstance(content, str):
        content = json.dumps({**report, content: None}).encode()
    (bundle / STEP).write_bytes(content)
    with pytest.raises(UsageError, match=r"bundle=.* cannot be read \(") as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"data": None}, {"config": 5}, {"skipped": "0"}, {"world_size": None}])
def test_a_whole_checkpoint_that_lacks_what_is_needed_is_passed_over(tmp_path, change, capfd):
    fit(settings(tmp_path), PLAIN)
    newest = tmp_path / f"checkpoints/step-{STEPS:08d}"
    data = json.dumps(json.loads((newest / files.STATE).read_text()) | change).encode()
    (newest / files.STATE).write_bytes(data)
    seals = json.loads((newest / files.MANIFEST).read_text())
    seals[files.STATE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / files.MANIFEST).write_text(json.dumps(seals))
    (key,) = change
    fit(settings(tmp_path), PLAIN)
    said = capfd.readouterr().err
    assert f"step-{STEPS:08d} is damaged and passed over: {files.STATE} has no '{key}'" in said and "going on" in said


def test_more_skipped_steps_than_allowed_stop_the_run(tmp_path):
    with pytest.raises(UsageError, match=r"\(0 were skipped before\)"):
        fit(settings(tmp_path, {"on_non_finite": "skip", "max_skipped": 0}), Term("loss", poisoned("loss")))


def told(at: int, number: int = signal.SIGTERM, again: bool = False):
    def tell(run: Run, step: int, module: torch.nn.Module) -> None:
        if step == at:
            os.kill(os.getpid(), number)
        if again and step == at + 1:
            os.kill(os.getpid(), number)

    return tell


@pytest.fixture
def handlers() -> Iterator[None]:
    """Once stopping, a process ignores further signals for good: not so this one."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PLAIN = Term("loss", cross_entropy())
PENALTY = Term("loss", build_objective(TermConfig(objective="nt_xent", penalty=PenaltyConfig(weight=0.5))))


def attacked(encoder: Encoder) -> Term:
    """With a start that is random, and a count of calls in a buffer."""
    attack = AttackConfig(name="pgd", steps=2)
    return Term("loss", cross_entropy(), 1.0, adversarial(attack, build_one_sided(TermConfig(objective="nt_xent")), 0))


def checkpointed(folder: Path, step: int = STEPS) -> dict[str, str]:
    seals = json.loads((folder / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {name: seals[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors")}


@pytest.mark.parametrize(("term", "accumulation"), [(PENALTY, 2), (attacked, 1)])
def test_interrupted_again_and_again_a_run_ends_bit_for_bit_as_undisturbed(tmp_path, handlers, term, accumulation):
    """Weights, optimiser, random state, and the images that were trained on."""
    train = {"accumulation": accumulation}
    _, whole, _ = fit(settings(tmp_path / "whole", train), term)
    taken = []
    for at in (1, 3, None):
        tell = told(at, again=True) if at else (lambda *_: None)
        finished, images, _ = fit(settings(tmp_path / "parts", train), term, tell)
        taken += images.seen
        assert finished == (at is None)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    assert taken == whole.seen
    assert checkpointed(tmp_path / "parts") == checkpointed(tmp_path / "whole")


def stopped(folder: str, number: int) -> tuple[bool, int]:
    where = told(2, number) if distributed.rank() == 1 else (lambda *_: None)
    finished, images, _ = fit(settings(folder), PLAIN, where)
    return finished, len(images.seen)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    results = run_ranks(2, stopped, str(tmp_path), signal.SIGUSR1, timeout=400)
    assert results == [(False, results[0][1])] * 2
    assert checkpointed(tmp_path, results[0][1])


def test_ctrl_c_saves_as_sigterm_does(tmp_path, handlers, capfd):
    finished, images, _ = fit(settings(tmp_path), PLAIN, told(2, signal.SIGINT))
    assert not finished and checkpointed(tmp_path, len(images.seen))
    assert "Ctrl-C again ends at once" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once_and_its_echo_does_not(handlers, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fasttrain.stop.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += ECHO / 2  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    now[0] += ECHO
    os.kill(os.getpid(), signal.SIGTERM)  # it is stopping
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigpending()


def test_a_job_that_is_not_to_heed_ctrl_c_does_not(handlers):
    """A shell's background job is started so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.received


class Evaluation:
    """Three batches long; the last rank is told to stop at the second of the evaluation after step ``at``."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def __call__(self, step: int) -> dict[str, float]:
        for batch in until_stopped(range(3)):
            if (step, batch, distributed.rank() + 1) == (self.at, 1, distributed.world_size()):
                os.kill(os.getpid(), signal.SIGTERM)
        return {"top1": 1 / (1 + abs(step - 2))}  # the best is step 2


def evaluated(folder: str, *told_at: int | None) -> list[tuple[bool, int]]:
    """Train in as many lives; of each, whether it finished and how many steps it took."""
    lives = []
    for at in told_at:
        config = settings(folder, keep=1, keep_best="max:top1")
        finished, images, _ = fit(config, PLAIN, evaluation=engine.Callback(2, Evaluation(at)))
        lives.append((finished, len(images.seen)))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return lives


def test_a_signal_during_an_evaluation_costs_no_step_and_no_evaluation(tmp_path):
    """The checkpoint is there before; all ranks leave at the same batch; the next life makes the evaluation."""
    assert run_ranks(2, evaluated, str(tmp_path / "whole"), None) == [[(True, STEPS)]] * 2
    lives = run_ranks(2, evaluated, str(tmp_path / "parts"), 2, 2, STEPS, None)
    assert lives == [[(False, 2), (False, 0), (False, STEPS - 2), (True, 0)]] * 2
    for name in ("whole", "parts"):
        lines = [x for x in read_metrics(tmp_path / name / "metrics.jsonl") if "top1" in x]
        assert [x["step"] for x in lines] == [0, 2, 4, STEPS]
        kept = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step-*"))
        assert kept == ["step-00000002", f"step-{STEPS:08d}"]  # the best, which knows that it is, and the last
    assert checkpointed(tmp_path / "parts") == checkpointed(tmp_path / "whole")


def test_an_evaluation_that_was_reported_is_not_made_again_and_still_marks_the_best(tmp_path, handlers):
    """A kill can come after the report and before it is noted beside the checkpoint."""
    assert evaluated(str(tmp_path), 2) == [(False, 2)]
    with (tmp_path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "top1": 0.75}\n')
    assert evaluated(str(tmp_path), None) == [(True, STEPS - 2)]
    assert json.loads((tmp_path / "checkpoints/step-00000002/metrics.json").read_text()) == {"top1": 0.75}


LEGS = (2, 4, 6, 8)
"Where each leg of a run ends: it takes two steps at least, being told after one and stopping after the next."


def carried(folder: str, stage: int, at: int | None) -> list[list[int]]:
    """Train from where the folder's last checkpoint is to ``at``; the images that were seen."""
    tell = told(at) if at else (lambda *_: None)
    return fit(settings(folder, {"zero_stage": stage, "steps": LEGS[-1]}), PLAIN, tell)[1].seen


def loaded(folder: str, stage: int) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold right after this one was loaded."""
    distributed.initialize("cpu")
    config = settings(folder, {"zero_stage": stage})
    module = step_of(PLAIN)
    trainer = engine.initialize(
        module, build_optimizer(config.optimizer, module, stage, torch.device("cpu")), config.train
    )
    checkpoint.restore(checkpoint.find(Path(folder) / "checkpoints")[0], trainer)
    taken = snapshot(trainer)
    return {} if taken is None else taken.model | taken.optimizer


@pytest.mark.faults
def test_another_world_size_and_stage_loads_the_same_bits_and_keeps_the_order(tmp_path):
    """1 -> 2 -> 4 -> 1 ranks with ZeRO 0 -> 1 -> 2 -> 0; each loads what the one before saved.

    The weights at the end are those of one rank undisturbed, to 1e-4 of each tensor's norm.
    """
    begun = 0
    for end, world, stage in zip(LEGS, (1, 2, 4, 1), (0, 1, 2, 0), strict=True):
        at = None if end == LEGS[-1] else end - 1
        ranks = run_ranks(world, carried, str(tmp_path), stage, at, timeout=400)
        together = [i for parts in zip(*ranks, strict=True) for part in parts for i in part]
        assert together == list(range(begun * GLOBAL, end * GLOBAL))
        begun = end
        found, _ = checkpoint.find(tmp_path / "checkpoints")
        saved = found.tensors("model.safetensors") | found.tensors("optimizer.safetensors")
        for other_world, other_stage in ((1, 0), (2, 2), (2, 1)):
            back = run_ranks(other_world, loaded, str(tmp_path), other_stage, timeout=400)[0]
            assert saved.keys() == back.keys() and all(torch.equal(saved[name], back[name]) for name in saved)
    run_ranks(1, carried, str(tmp_path / "undisturbed"), 0, None, timeout=400)
    whole = checkpoint.find(tmp_path / "undisturbed" / "checkpoints")[0].tensors("model.safetensors")
    weights = {name: tensor for name, tensor in whole.items() if tensor.is_floating_point()}
    assert largest_difference(saved, weights) < 1e-4


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    refused = pytest.raises(UsageError, match=rf"held by a live run \(process {os.getpid()} on ")
    with Run(RunConfig(dir=str(tmp_path))), refused:
        Run(RunConfig(dir=str(tmp_path)))
    with Run(RunConfig(dir=str(tmp_path))):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capfd):
    def without(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    with Run(RunConfig(dir=str(tmp_path))):
        pass
    assert "without locks (Function not implemented)" in capfd.readouterr().err


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_at_the_start_stops_the_run_or_not_as_told(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"cannot be written .*No space left.*free"):
        patch.setattr("fasttrain.run.replace_file", full)
        fit(settings(tmp_path / "stop"), PLAIN)
    with monkeypatch.context() as patch, Run(RunConfig(dir=str(tmp_path / "on"), on_save_error="continue")) as run:
        patch.setattr("fasttrain.run.replace_file", full)
        patch.setattr("torch.utils.tensorboard.SummaryWriter", full)
        run.open(settings(tmp_path / "on"), 0, 2)
        run.report(1, {"loss": 1.0})
        patch.undo()
        run.report(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "on/metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "on/tensorboard").iterdir())
    assert capfd.readouterr().err.count("WARNING: the configuration and reports cannot be written") == 1


def test_a_full_disk_costs_reports_and_no_run(tmp_path, capfd):
    with Run(RunConfig(dir=str(tmp_path))) as run:
        run.open(settings(tmp_path), 0, 2)
        run._metrics.close()
        run._metrics = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
        for step in (1, 2):
            run.report(step, {"loss": 1.0})
    assert capfd.readouterr().err.count("WARNING: what step") == 1
