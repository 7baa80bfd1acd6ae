"""Schedule and LARS against their equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fasttrain.config import resolve
from fasttrain.errors import UsageError
from fasttrain.optim import LARS, OptimizerConfig, build_optimizer, require_apex, schedule


def test_schedule_is_the_stated_one():
    rate = schedule(peak=0.8, warmup=4, total=12)
    expected = [0.8 * (t + 1) / 4 if t < 4 else 0.4 * (1 + math.cos(math.pi * (t - 4) / 8)) for t in range(12)]
    assert [rate(t) for t in range(12)] == pytest.approx(expected)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match=r"20 steps of warm-up in a run of 10"):
        schedule(1.0, warmup=20, total=10)


def test_in_steps_the_learning_rate_is_a_tenth_from_each_milestone_on():
    config = OptimizerConfig(schedule="steps", milestones=(1.5, 3))
    falls = config.falls(steps_per_epoch=4, total=13)
    rate = schedule(0.8, warmup=2, total=13, kind="steps", falls=falls)
    assert falls == [6, 12]
    assert [rate(t) for t in range(13)] == pytest.approx([0.4, 0.8, *[0.8] * 4, *[0.08] * 6, 0.008])
    assert not config.depends_on_total and not OptimizerConfig().falls(4, 13)


def test_in_steps_it_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    rate = schedule(0.1, 0, 25, "steps", falls=OptimizerConfig(schedule="steps", milestones=(10, 20)).falls(1, 25))
    for epoch in range(25):
        assert rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_a_milestone_that_the_run_does_not_reach_is_named():
    config = OptimizerConfig(schedule="steps", milestones=(10, 20, 22.5))
    with pytest.raises(
        UsageError, match=r"milestones=\[10, 20, 22.5\]: 20, 22.5 is not before .* after 15 epochs: leave"
    ):
        config.falls(steps_per_epoch=4, total=60)
    assert config.falls(4, 91) == [40, 80, 90]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "steps"}, r"schedule=steps without milestones: give epochs, milestones=\[10, 20\]"),
        ({"schedule": "steps", "milestones": [20, 10]}, r"milestones=\[20, 10\]: give epochs above 0, each later"),
        ({"milestones": [0, 10]}, r"milestones=\[0, 10\]"),
        ({"milestones": [10, 10]}, r"milestones=\[10, 10\]"),
    ],
)
def test_milestones_that_make_no_schedule_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        resolve(OptimizerConfig, values)


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 4.8), ("sqrt", 1.2), ("none", 0.3)])
def test_peak_learning_rate_scales_with_the_global_batch(scaling, peak):
    assert OptimizerConfig(lr=0.3, lr_scaling=scaling).peak(4096) == pytest.approx(peak)


def test_lars_equals_its_equations_in_a_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3, bias=False)
    ).double()
    config = OptimizerConfig(name="lars", lr=0.3, weight_decay=0.1, momentum=0.8, trust_coefficient=0.02)
    optimizer = build_optimizer(config, model, zero_stage=0, device=torch.device("cpu"))
    weights = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for _ in range(3):
        x = torch.randn(11, 5, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for w, v, p in zip(weights, velocity, model.parameters(), strict=True):
            direction, ratio = p.grad.clone(), 1.0
            if p.ndim > 1:
                direction += 0.1 * w
                ratio = 0.02 * w.norm() / direction.norm()
            v.mul_(0.8).add_(0.3 * ratio * direction)
            w.sub_(v)
        optimizer.step()
    for w, p in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_lars_with_a_zero_weight_or_gradient_takes_ratio_one():
    zero_weight, zero_gradient = torch.zeros(2, 2), torch.ones(2, 2)
    parameters = [torch.nn.Parameter(zero_weight), torch.nn.Parameter(zero_gradient)]
    optimizer = LARS([{"params": parameters}], lr=0.5, momentum=0.0, weight_decay=0.0)
    parameters[0].grad, parameters[1].grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((2, 2), -0.5))
    torch.testing.assert_close(parameters[1].detach(), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_biases_and_batchnorm_are_not_decayed(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, model, zero_stage=0, device=torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False]


def test_apex_that_is_missing_names_its_install_command():
    try:
        import amp_C  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"git clone https://github.com/NVIDIA/apex"):
            require_apex()
    else:
        pytest.skip("NVIDIA apex is installed here, so there is no missing one to complain of")
