"""A Triton kernel that fails or is wrong is passed over, aloud and once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from fasttrain_kernels import ntxent, trial
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


@pytest.mark.parametrize(
    ("rows", "precision", "temperature", "name"),
    [
        (1024, "bf16", 0.1, "NT-Xent (bf16, blocks of 16)"),
        (32768, "bf16", 0.1, "NT-Xent (bf16, blocks of 128)"),
        (32768, "fp32", 0.01, "NT-Xent (fp32, blocks of 64, low temperature)"),
    ],
)
def test_nt_xent_is_tried_as_it_will_run(rows, precision, temperature, name, monkeypatch):
    tried = []

    def loss(z, temperature, columns, offset, how):
        tried.append((z.shape[-1], temperature < 1 / 32, how))
        return z.square().sum(-1) if how.impl == "reference" else z.pow(4).sum(-1)

    monkeypatch.setattr(ntxent, "_nt_xent", loss)
    monkeypatch.setattr(ntxent, "_trial", partial(ntxent._trial, device="cpu"))
    with pytest.warns(RuntimeWarning, match=re.escape(f"Triton's {name} is not used on this GPU")):
        assert not ntxent._passes(ntxent._How("auto", precision, rows), temperature)
    how = ntxent._How("triton", precision, rows)
    assert tried == [(128, temperature < 1 / 32, how._replace(impl="reference")), (128, temperature < 1 / 32, how)]


@needs_interpreter
def test_every_kernel_passes_its_trial_when_interpreted():
    program = """
from importlib import import_module
import torch
from fasttrain_kernels import ntxent
from fasttrain_kernels.trial import TOLERANCE
for precision in ("bf16", "tf32"):  # what the tolerance leaves to a tensor core
    how = ntxent._How("auto", precision, 2**15)
    for ours, truth in zip(ntxent._trial("triton", "cpu", how), ntxent._trial("reference", "cpu", how), strict=True):
        assert (ours - truth).norm() < TOLERANCE / 2 * truth.norm(), precision
for kernel in ("ntxent", "batchnorm", "apgd", "augment.gpu"):
    trial = import_module(f"fasttrain_kernels.{kernel}")._trial
    for ours, truth in zip(trial("triton", "cpu"), trial("reference", "cpu"), strict=True):
        assert (ours - truth).norm() < 1e-5 * truth.norm(), kernel
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
