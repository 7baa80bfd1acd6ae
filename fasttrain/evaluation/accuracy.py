"""Top-k accuracy, and what its counts need to agree on between ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttrain.distributed import all_gather_object


def hits(scores: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """How many of the rows have their label among the k best scores, for each k: [len(ks)] int64.

    Of equal scores the lower class comes first, so the count is the same on every device; a class without any score
    (−∞) is never among the best, and neither is any class of a row with a score that is NaN or +∞.

    Args:
        scores: [n, classes].
        labels: [n].
    """
    label = labels.unsqueeze(1)
    own = scores.gather(1, label)
    earlier = torch.arange(scores.shape[1], device=scores.device) < label
    place = ((scores > own) | ((scores == own) & earlier)).sum(1)
    incomparable = (scores.isnan() | (scores == torch.inf)).any(1)
    place = place.masked_fill((own.squeeze(1) == -torch.inf) | incomparable, max(ks))
    return torch.stack([(place < k).sum() for k in ks])


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


def count_classes(*labels: Tensor) -> int:
    """Classes among all ranks' labels: the largest of them plus one."""
    return max(all_gather_object(max((int(part.max()) + 1 for part in labels if len(part)), default=0)))
