"""What is said with an accuracy: how many images it is of, how far that number tells, and which attack it is under."""

from __future__ import annotations

import math
from typing import Any

UPPER_BOUND = "an upper bound: robust.attack.name=autoattack gives the figure that tables report"
"Of a robust accuracy under one attack."


def percent(share: float) -> str:
    """``62.5 %`` of 0.625, for people."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "not finite"


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the share of which ``count`` of ``total`` are a sample (Wilson 1927).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = count / n and z = 1.96, the normal's quantile.
    """
    z, share = 1.959963984540054, count / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # at 0 and at all of them an end is exact, and would be rounded
    return (
        0.0 if count == 0 else (middle - spread) / scale,
        1.0 if count == total else (middle + spread) / scale,
    )


def interval_text(share: float, total: int) -> str:
    """``62.5 % (5 of 8, 95 % interval 30.6 to 86.3)``, the interval :func:`wilson`'s."""
    count = round(share * total)
    low, high = wilson(count, total)
    return f"{percent(share)} ({count:,} of {total:,}, 95 % interval {100 * low:.1f} to {100 * high:.1f})"


def attack_text(attack: dict[str, Any]) -> str:
    """``apgd on cross-entropy, linf 8/255, 10 steps``, of an attack's settings: what a robust accuracy is of."""
    size = f"{attack['norm']} {attack['eps_255']:g}/255"
    if attack["name"] == "autoattack":
        named = ", ".join(attack["attacks"] or ()) or "all four"
        budget = f"{attack['steps']} steps, {attack['targets']} targets, {attack['queries']:,} queries"
        custom = f" ({named}; {budget})" if attack["version"] == "custom" else ""
        return f"AutoAttack, {attack['version']}{custom}, {size}"
    steps = [f"{attack['steps']} steps"] if attack["name"] != "fgsm" else []
    more = [f"steps of {attack['step_255']:g}/255"] if attack.get("step_255") is not None else []
    more += [f"{attack['restarts']} restarts"] if attack["restarts"] != 1 else []
    more += ["from the image itself"] if attack["name"] == "pgd" and not attack["random_start"] else []
    return ", ".join([f"{attack['name']} on cross-entropy", size, *steps, *more])


__all__ = ["UPPER_BOUND", "attack_text", "interval_text", "percent", "wilson"]
