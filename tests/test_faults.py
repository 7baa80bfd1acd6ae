"""Each scenario of the battery, a few times; ``python -m tests.faults`` runs the full counts."""

from __future__ import annotations

import random

import pytest

from tests.faults.__main__ import FULL, OF_TESTS

SHARE = {"killed_at_random": 0.06, "corrupted": 0.2, "failing_disk": 0.2, "rank_lost": 0.1}


@pytest.mark.faults
@pytest.mark.parametrize("scenario", sorted(FULL.keys() - OF_TESTS - {"left_alone"}))
def test_nothing_breaks(scenario, tmp_path):
    """All but a long run that is left alone, which says nothing when it is short."""
    for row in FULL[scenario](tmp_path, SHARE.get(scenario, 0.04), random.Random(0)):
        assert not row.broken, f"{row.fault}: {row.broken}"
