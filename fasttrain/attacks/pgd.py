"""Projected gradient ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.attacks.evaluation import Attack, PerImageLoss, loss_and_gradient, loss_only
from fasttrain.attacks.noise import restarted
from fasttrain.attacks.threat import Threat
from fasttrain.errors import UsageError


def pgd(
    threat: Threat, steps: int, step_size: float | None = None, *, restarts: int = 1, random_start: bool = True
) -> Attack:
    """x ← P(x + η d(∇ℓ(x))), ``steps`` times; the last iterate (Madry et al. 2018). Clamped to [0, 1].

    d is the steepest direction of unit norm and P the projection, both the threat model's. Of several restarts each
    image keeps the one of the highest loss. Costs ``restarts · steps`` forwards with input gradients, and a forward a
    restart where there are several.

    Args:
        step_size: η, in units of the images; ``None``: 2.5 eps / steps.
        random_start: begin at a random point of the ball, otherwise at the image.

    Raises:
        UsageError: steps or restarts below 1, restarts without a random start.
    """
    if steps < 1 or restarts < 1:
        raise UsageError(f"PGD with steps={steps}, restarts={restarts}: give at least 1 of each")
    if restarts > 1 and not random_start:
        raise UsageError(f"PGD with restarts={restarts} from the image itself: all would be one; set random_start=true")
    size = 2.5 * threat.eps / steps if step_size is None else step_size

    def run(loss_of_images: PerImageLoss, images: Tensor, keys: Tensor) -> Tensor:
        x = threat.start(images, keys) if random_start else images
        for _ in range(steps):
            _, gradient = loss_and_gradient(loss_of_images, x)
            x = threat.project(threat.step(x, gradient, size), images)
        return x

    def attack(loss_of_images: PerImageLoss, images: Tensor, keys: Tensor | None = None) -> Tensor:
        images = images.detach()
        keys = torch.arange(len(images), device=images.device) if keys is None else keys
        best = run(loss_of_images, images, keys)
        if restarts == 1:
            return best
        highest = loss_only(loss_of_images, best)
        for restart in range(1, restarts):
            x = run(loss_of_images, images, restarted(keys, restart))
            loss = loss_only(loss_of_images, x)
            best = torch.where((loss > highest)[:, None, None, None], x, best)
            highest = torch.maximum(highest, loss)
        return best

    return attack
