"""The heap that a process keeps, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from fasttrain_kernels.heap import keep_heap

if not keep_heap():
    sys.exit(77)
for round in range(40):
    if round == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_pages_are_used_again() -> None:
    """Twenty tensors of 40 MiB, one after another, need 204,800 new pages of 4 KiB where each is mapped anew."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 50_000
