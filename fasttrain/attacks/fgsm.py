"""The fast gradient (sign) method."""

from __future__ import annotations

from torch import Tensor

from fasttrain.attacks.evaluation import Attack, PerImageLoss, loss_and_gradient
from fasttrain.attacks.threat import Threat


def fgsm(threat: Threat) -> Attack:
    """One step of length eps from the image: x + ε sign ∇ℓ(x) in L∞, x + ε ∇ℓ/‖∇ℓ‖ in L2 (Goodfellow et al. 2015).

    Clamped to [0, 1], which some implementations leave out.
    """

    def attack(loss_of_images: PerImageLoss, images: Tensor, keys: Tensor | None = None) -> Tensor:
        images = images.detach()
        _, gradient = loss_and_gradient(loss_of_images, images)
        return threat.project(threat.step(images, gradient, threat.eps), images)

    return attack
