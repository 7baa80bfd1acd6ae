"""Each scenario of the battery, a few times; ``python -m tests.faults`` runs the full counts."""

from __future__ import annotations

import random

import pytest

from tests.faults.__main__ import FULL

SHARE = {"killed_at_random": 0.06, "killed_while_saving": 0.02, "told_to_stop": 0.06, "corrupted": 0.2}


@pytest.mark.faults
@pytest.mark.parametrize("scenario", FULL)
def test_nothing_breaks(scenario, tmp_path):
    for row in FULL[scenario](tmp_path, SHARE.get(scenario, 0.05), random.Random(0)):
        assert not row.broken, f"{row.fault}: {row.broken}"
