"""Square."""

from __future__ import annotations

from fasttrain.attacks.search import Cases, Found, Search, Standing, Victim
from fasttrain.attacks.threat import Threat


def square(threat: Threat, queries: int) -> Search:
    def search(victim: Victim, cases: Cases) -> Found:
        return Standing(victim, cases).found

    return search
