"""Top-k accuracy, and what its counts need to agree on between ranks."""

from __future__ import annotations

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


def count_classes(*labels: Tensor) -> int:
    """Classes among all ranks' labels: the largest of them plus one."""
    return max(all_gather_object(max((int(part.max()) + 1 for part in labels if len(part)), default=0)))
