"""Views that an attack makes, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.attacks import AttackConfig, attacked, image_keys, make_attack
from fasttrain.attacks.evaluation import Watched
from fasttrain.data import Batch
from fasttrain.models import Encoder, frozen_statistics
from fasttrain.objectives import OneSided
from fasttrain.views.view import put, take


def adversarial(
    attack: AttackConfig, against: OneSided, seed: int, index: int = 0, accumulation: int = 1, beside: bool = False
) -> Adversarial:
    """The batch with one view moved, inside its threat model, to where ``against`` is high.

    With x the view, x⁺ the others, φ the encoder and ℓ the one-sided loss that ``against`` makes of φ(x⁺), batch::

        view(x, x⁺) = (z, x⁺),      z ≈ argmax ℓ(φ(x')) over x' in B(x) ∩ [0, 1]

    With ``beside`` z comes after all views, x among them, and what ``against`` gets is φ of all of them::

        view(x) = (x, z),           z ≈ argmax ℓ(φ(x')),    ℓ made of φ(x)

    φ(x⁺) is computed, and gathered over the ranks, once a batch; of a batch of one view there is none, and ``against``
    gets ``None`` for it. What comes back is a constant: an objective on it trains the encoder on the images as they are
    (Lubana & Aldeeb, section 3.2; Madry et al. 2018). Running statistics are left alone, weights get no gradient, and
    every rank takes the same steps. Under autocast the attack is autocast too. Where a loss or gradient that the attack
    meets is not finite, the view is NaN, so that the step is treated as one whose own loss is not finite.

    Random starts are a function of (``seed``, optimiser step, position of the image in the data set), the step counted
    from the calls in a buffer: a resumed run continues it, and any number of ranks or micro-batches draws the same.

    Args:
        attack: which, how far, and the BatchNorm mode in which φ is attacked; "train" takes the statistics of x' and of
            x⁺ apart.
        against: what to raise; :func:`~fasttrain.objectives.build_one_sided` has that of each objective.
        index: which of the batch's views.
        accumulation: calls to an optimiser step.
        beside: whether the attacked images come beside the view that they were, instead of in its place.

    Raises:
        UsageError: the batch has no such view (on the call).
    """
    return Adversarial(attack, against, seed, index, accumulation, beside)


class Adversarial(nn.Module):
    """See :func:`adversarial`."""

    def __init__(
        self, attack: AttackConfig, against: OneSided, seed: int, index: int, accumulation: int, beside: bool
    ) -> None:
        super().__init__()
        self.attack, self.batchnorm = make_attack(attack), attack.batchnorm
        self.against, self.seed, self.index, self.accumulation = against, seed, index, accumulation
        self.beside = beside
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, encoder: Encoder, batch: Batch) -> Batch:
        place = len(batch.images) if self.beside else self.index
        return put(batch, place, self.moved(encoder, batch))

    def moved(self, encoder: Encoder, batch: Batch) -> Tensor:
        """The images that take the view's place, or come beside it."""
        images, others = take(batch, self.index)
        others = list(batch.images) if self.beside else others
        model = attacked(encoder, self.batchnorm)
        with torch.no_grad(), frozen_statistics():
            fixed = model(torch.cat(others)) if others else None
        against = self.against(fixed, batch)
        loss = Watched(lambda x: against(model(x)))
        keys = image_keys(self.seed, self.calls // self.accumulation, batch.index)
        self.calls += 1
        moved = loss.or_nan(self.attack(loss, images, keys))
        if self.batchnorm == "train":
            # before PyTorch 2.11 the encoding to come would meet weights that autocast cast in here, without a graph
            torch.clear_autocast_cache()
        return moved


__all__ = ["Adversarial", "adversarial"]
