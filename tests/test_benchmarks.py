"""The benchmark runs, and its table says what it timed."""

from __future__ import annotations

import json

import pytest
import torch

from fasttrain.attacks import apgd
from fasttrain.attacks.losses import squared_distance
from fasttrain.benchmarks import step
from fasttrain.benchmarks.attack import THREAT, no_lower, published_apgd
from fasttrain.benchmarks.network import NetworkConfig, plain, setting
from fasttrain.benchmarks.timing import Comparison, StepTiming, Stopwatch, alternate, alternate_steps, table
from fasttrain.config import load
from fasttrain.errors import UsageError
from fasttrain.models import ModelConfig
from tests.test_launch import script


def test_contestants_take_turns_after_a_warm_up():
    turns = []

    def contestant(name):
        def run():
            turns.append(name)
            return 10

        return run

    timings = alternate({"a": contestant("a"), "b": contestant("b")}, rounds=2)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert [len(timing.rates) for timing in timings] == [2, 2]
    assert "| a |" in table(timings, "images")


def test_loaders_are_compared_with_bare_pipelines(images, tmp_path, capsys):
    module = script("bench")
    small = ["batch=4", "batches=3", "rounds=1", "augment.size=16", "loader.threads=1"]
    given = [f"data.root={images}", f"output={tmp_path / 'bench.json'}", *small]
    module.bench(load(module.LoaderBench, ["task=loader", *given]))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names == ["fasttrain, all", "fasttrain, crop and flip", "bare DALI, all", "bare DALI, crop and flip"]
    assert all(row["rates"][0] > 0 for row in rows)
    assert "bare DALI, all" in capsys.readouterr().out


NETWORK = NetworkConfig(
    model=ModelConfig(arch="resnet18", stem="cifar", width=0.0625, zero_init_residual=False),
    size=16,
    batch=8,
    precision="fp32",
)


def run(task: str, tmp_path, *arguments: str) -> dict:
    module = script("bench")
    schema = module.TASKS[task].schema
    given = [f"task={task}", "quick=true", f"output={tmp_path / 'bench.json'}", *arguments]
    module.bench(load(schema, given, module.quick))
    assert (tmp_path / "bench.png").stat().st_size > 1000
    return json.loads((tmp_path / "bench.json").read_text())


def test_steps_match_the_plain_ones_and_are_all_in_the_table(tmp_path, capsys):
    found = run("step", tmp_path, "precision=fp32")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "plain",
        "plain, PyTorch",
        "penalty, double backward",
        "penalty, PyTorch",
        "penalty, finite difference",
        "adversarial view, PGD-5",
        "structured view, colour",
        "FARE, APGD-10",
        "FARE, published code",
        "F: forward",
        "F + G: forward, input gradient",
        "F + B: forward, backward",
        "FARE's floor",
    ]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows if name != "FARE's floor")
    assert "DOES NOT MATCH" not in printed
    assert printed.count("times as fast as") == 3
    assert set(rows["FARE, APGD-10"]["shares"]) == {"forward", "reference", "attack", "backward", "optimiser"}
    assert set(rows["structured view, colour"]["shares"]) == {"forward", "view", "backward", "optimiser"}
    assert found["config"]["model"]["width"] == 0.0625 and found["config"]["rounds"] == 1


def test_attacks_are_all_in_the_table(tmp_path, capsys):
    found = run("attack", tmp_path, "precision=bf16", "iterations=3")
    names = [row["name"] for row in found["rows"]]
    ours = "ours (folded, channels-last, bf16 autocast)"
    assert names[:7] == [
        "forward, PyTorch",
        "forward and input gradient, PyTorch",
        f"forward, {ours}",
        f"forward and input gradient, {ours}",
        f"APGD-3, {ours}",
        "APGD-3, ours on the plain network",
        "APGD-3, published code",
    ]
    losses = [row["final_loss"] for row in found["rows"][5:7]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_a_wrong_penalty_gets_no_speed_up(tmp_path, monkeypatch, capsys):
    right = step.gradient_penalty
    monkeypatch.setattr(step, "gradient_penalty", lambda of, weight, *a, **k: right(of, 1.01 * weight, *a, **k))
    run("step", tmp_path, "precision=fp32", "pgd_steps=1")
    printed = capsys.readouterr().out
    assert "penalty, double backward DOES NOT MATCH penalty, PyTorch" in printed
    assert "penalty, double backward: " not in printed


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_published_attack_and_ours_go_the_same_way(steps):
    place = setting(NETWORK)
    encoder, batch = plain(place.encoder).double().eval(), place.batch(1)
    images = batch.images[0].double()
    targets = encoder(images).features.detach()

    def loss(x):
        return squared_distance(encoder(x).features, targets)

    start = THREAT.start(images, batch.index)
    theirs = published_apgd(loss, images, start, THREAT.eps, steps)
    assert (theirs - images).abs().max() <= THREAT.eps + 1e-12
    assert torch.allclose(theirs, apgd(THREAT, steps)(loss, images), rtol=0, atol=1e-9)
    assert (loss(theirs) > loss(start)).all()


def test_the_plain_network_is_the_same_function():
    place = setting(NETWORK)
    twin = plain(place.encoder)
    assert not any(type(module).__module__ == "fasttrain.models.batchnorm" for module in twin.modules())
    assert twin.state_dict().keys() == place.encoder.state_dict().keys()
    for mode in (True, False):
        found, expected = twin.train(mode)(place.images), place.encoder.train(mode)(place.images)
        assert torch.allclose(found.projections, expected.projections, rtol=1e-4, atol=1e-4)


def test_a_lower_attack_is_told_from_noise():
    base = torch.linspace(10, 20, 64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert no_lower("a", "b", {"a": base + noise, "b": base}).agrees
    assert not no_lower("a", "b", {"a": 0.95 * base, "b": base}).agrees
    assert no_lower("a", "b", {"a": 1.05 * base, "b": base}).agrees


def test_parts_of_a_step_add_up():
    def contestant(stopwatch: Stopwatch) -> None:
        stopwatch.mark("first")
        stopwatch.mark("second")
        stopwatch.mark("first")

    timing = alternate_steps({"a": contestant}, rounds=3, steps=2, device=torch.device("cpu"))["a"]
    assert len(timing.parts) == len(timing.cpu) == 3 and set(timing.parts[0]) == {"first", "second"}
    assert sum(timing.shares().values()) == pytest.approx(1, abs=0.2)
    slow = StepTiming("slow", [{"all": 4.0}, {"all": 6.0}, {"all": 1.0}], [8.0, 8.0, 8.0], [])
    fast = StepTiming("fast", [{"all": 2.0}], [2.0], [])
    assert slow.over(fast) == 2 and slow.cpu_over(fast) == 4 and slow.spread == "1,000.0 to 6,000.0"
    sentence = Comparison("fast", "slow", True, "").sentence({"fast": fast, "slow": slow})
    assert "2.00 times as fast as slow, 4.00 by CPU time" in sentence


def test_keys_of_another_task_are_refused():
    module = script("bench")
    with pytest.raises(UsageError, match="unknown key 'loader"):
        load(module.StepBench, ["task=step", "loader.kind=ffcv"])
