"""Features that are not finite: no metric is made of them, and where they come from is said.

A NaN is neither more nor less than anything: left alone it would be the best of all scores, or the first class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fasttrain.distributed import all_gather_object, all_reduce
from fasttrain.errors import NotFinite
from fasttrain.evaluation.features import Features
from fasttrain.nonfinite import unusable

ROWS = 65536  # looked at together
SHOWN = 64  # images of each rank that are encoded again to learn why


def check_features(which: str, samples: Features, why: Callable[[list[int]], str] | None = None) -> None:
    """See that all ranks' features are finite; the ranks together.

    Args:
        which: "training images", say.
        why: positions of a few images whose features are not finite -> the reason, as the rest of a sentence.

    Raises:
        NotFinite: on all ranks, where any feature of any rank is not; it says how many images.
    """
    bad = torch.cat([~rows.isfinite().all(1) for rows in samples.features.split(ROWS)])
    count, total = all_reduce(torch.stack([bad.sum(), bad.new_tensor(len(bad), dtype=torch.int64)])).tolist()
    if count:
        message = f"the features of {count:,} of {total:,} {which} are not finite"
        if why is not None:
            mine = samples.index[bad][:SHOWN].tolist()
            message += f": {why(sorted(index for part in all_gather_object(mine) for index in part))}"
        raise NotFinite(message)


def reason(module: nn.Module, autocast: torch.dtype | None, finite_in_fp32: Callable[[], bool]) -> str:
    """Why what ``module`` gives is not finite: its weights, the precision, or neither."""
    if found := unusable(module.state_dict()):
        return f"the encoder's {found}"
    if autocast is not None and finite_in_fp32():
        remedy = "bf16, or fp32" if autocast == torch.float16 else "fp32"
        return f"in fp32 they are, so it is the precision's doing: set precision={remedy} (of a run: train.precision)"
    return "its weights are finite, and what they give is too large for fp32: it has diverged"


__all__ = ["check_features", "reason"]
