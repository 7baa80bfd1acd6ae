"""The real loop on a GPU: what its host waits for, that every mode steps; and that a graph replays an attack."""

from __future__ import annotations

import pytest
import torch

from fasttrain import distributed
from fasttrain.benchmarks.truth.cases import StepCase
from fasttrain.benchmarks.truth.graph import captured_attack
from fasttrain.benchmarks.truth.steps import modes
from fasttrain.benchmarks.truth.waits import waits_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def device():
    return distributed.initialize("cuda")


@pytest.mark.parametrize("kind", ["plain", "penalty", "pgd-5", "fare"])
def test_a_step_waits_for_its_verdict_alone(device, kind):
    found = waits_of(StepCase(kind, images=32), device)
    others = {place: times for place, times in found.items() if "synchronize() of Event" not in place}
    assert not others, found


def test_every_mode_steps(device):
    failed = [row.line() for row in modes(device) if row.passed is False]
    assert not failed


def test_a_captured_attack_is_the_attack(device):
    assert captured_attack(StepCase("fare", images=64), device).differs == 0
