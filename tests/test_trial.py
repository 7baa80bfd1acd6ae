"""A Triton kernel that fails or is wrong is passed over, aloud and once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fasttrain_kernels import trial
from tests.interpreter import needs_interpreter


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(trial, "_verdicts", {})


def results(triton):
    return lambda impl: [torch.ones(3)] if impl == "reference" else triton()


def test_a_right_kernel_is_used():
    assert trial.triton_passes("sum", results(lambda: [torch.ones(3) + 1e-6]))


@pytest.mark.parametrize("wrong", [torch.ones(3) * 1.1, torch.full((3,), torch.nan)])
def test_a_wrong_kernel_is_not(wrong):
    with pytest.warns(RuntimeWarning, match="Triton's sum is not used on this GPU: its result 0 is"):
        assert not trial.triton_passes("sum", results(lambda: [wrong]))
    assert not trial.triton_passes("sum", results(lambda: [torch.ones(3)]))  # found once, said once


def test_a_kernel_that_does_not_compile_is_not():
    def fail():
        raise RuntimeError("ptxas:\n  no such target")

    with pytest.warns(RuntimeWarning, match="RuntimeError: ptxas: no such target"):
        assert not trial.triton_passes("sum", results(fail))


@needs_interpreter
def test_every_kernel_passes_its_trial_when_interpreted():
    program = """
from importlib import import_module
for kernel in ("ntxent", "batchnorm", "apgd"):
    trial = import_module(f"fasttrain_kernels.{kernel}")._trial
    for ours, truth in zip(trial("triton", "cpu"), trial("reference", "cpu"), strict=True):
        assert (ours - truth).norm() < 1e-5 * truth.norm(), kernel
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
