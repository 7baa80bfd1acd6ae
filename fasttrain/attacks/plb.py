"""ProxLogBarrier: the smallest change that makes a loss positive."""

from __future__ import annotations

import math
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.attacks.evaluation import Attack, PerImageLoss, loss_and_gradient, loss_only
from fasttrain.attacks.noise import restarted, uniform
from fasttrain.config import Config
from fasttrain_kernels.apgd import Norm, ascend

ASCENT = 60
"Evaluations for steps up the loss, of 1/500 of the pixel range and then a fifth more each, up to all of it."
GEOMETRIC = 50
"A step takes off at least one in so many parts of the change: from far off, the way back is geometric."
HALVINGS = 6
"Bisections between the image and a success that was found elsewhere."


class PLBSteps(Config):
    """How PLB goes about it, whatever the norm."""

    steps: int = pydantic.Field(default=300, ge=1)
    """Evaluations (forward and input gradient) an image; the authors take 900 and those of their backtracking."""
    step_size: float = pydantic.Field(default=0.1, gt=0)
    """Step on the barrier, in units of the images (0 to 1) over those of the loss."""
    barrier: float = pydantic.Field(default=0.1, gt=0)
    """Weight of the barrier at first."""
    decay: float = pydantic.Field(default=0.75, gt=0, le=1)
    """Factor on the barrier's weight, every `inner` steps."""
    inner: int = pydantic.Field(default=10, ge=1)
    """Steps between two decays of the barrier; a thirtieth of all steps suits."""
    shrink: float = pydantic.Field(default=1.0, gt=0)
    """What a step takes off the change at least, in its L1 norm (linf) or its L2 norm (l2); or 1/50 of it, if more."""
    backtrack: float = pydantic.Field(default=0.05, gt=0, lt=1)
    """Share of a move that is kept, time after time, while the image it leads to is not misclassified."""


class PLBConfig(PLBSteps):
    norm: Norm = "linf"
    """Norm of the change to be made small: linf or l2."""


def plb(config: PLBConfig) -> Attack:
    """Minimise ‖x − image‖ − λ log ℓ(x) over ℓ(x) > 0, x in [0, 1], for λ → 0 (Pooladian et al. 2020).

    ℓ is positive where the attack has succeeded: for misclassification :func:`fasttrain.attacks.losses.margin`. One
    step from a successful x is

        x ← clamp(image + prox(x + h λ ∇ℓ(x)/ℓ(x) − image), 0, 1),      prox(d) = argmin_u ‖u‖ + ‖u − d‖²/2μ

    and an x that has not succeeded goes back towards the last one that had. Returned is each image's successful iterate
    of the smallest norm; the image itself where ℓ was positive there, or where none was found.

    μ is ``shrink`` or 1/50 of the change, h ``step_size`` and λ ``barrier``, decayed. The norms found hardly depend on
    them: on a small network they stay within 2 % for shrink 0.1 to 3, and 300 steps come within 0.5 % of 900.

    The first success is looked for up the loss, in steps that grow to the pixel range, for `ASCENT` evaluations (half
    of all, growing faster, if that is less). Where that finds none, since the gradient is 0 or leads round in circles,
    it is looked for to the last evaluation at, and one step up the loss from, images of growing change: towards black,
    white, the colours between, coarse and fine noise, which is a function of ``keys``. So an image is passed over only
    if all of these are classified as it is. A success that late may lie far off: `HALVINGS` bisections towards the
    image follow, and μ makes the way back geometric.

    The authors' code differs in three points. Its proximal operator of the L∞ norm projects onto the L1 *sphere*, which
    is wrong inside the ball; here it is the true one. It backtracks until every image of the batch has succeeded;
    here a backtrack is one of the image's own ``steps``, so that their number is fixed and images do not wait
    for each other. And it starts from growing noise alone, which finds starts further off.
    """

    ascent = min(ASCENT, (config.steps + 1) // 2)
    growth = 1.2 ** (ASCENT / ascent)

    def attack(loss_of_images: PerImageLoss, images: Tensor, keys: Tensor | None = None) -> Tensor:
        images = images.detach()
        keys = torch.arange(len(images), device=images.device) if keys is None else keys
        dual: Norm | Literal["l1"] = "l2" if config.norm == "l2" else "l1"
        root = math.sqrt(math.prod(images.shape[1:])) if config.norm == "l2" else 1.0  # of a change of 1 in every value
        x = best = last_success = last_failure = images
        smallest = images.new_full((len(images), 1, 1, 1), torch.inf)
        halvings = torch.zeros_like(smallest, dtype=torch.int32)  # to come
        for iteration in range(config.steps):
            loss, gradient = loss_and_gradient(loss_of_images, x)
            loss = loss[:, None, None, None]
            success, started = loss > 0, smallest < torch.inf
            best, smallest = _nearer(success, x, images, best, smallest, config.norm)
            last_success = torch.where(success, x, last_success)
            last_failure = torch.where(started & ~success, x, last_failure)

            weight = config.barrier * config.decay ** (iteration // config.inner)
            uphill = x + config.step_size * weight * gradient / loss.clamp(min=1e-12).to(x.dtype)
            shrink = (_length(x - images, dual) / GEOMETRIC).clamp(min=config.shrink)
            onwards = (images + _PROX[config.norm](uphill - images, shrink)).clamp(0, 1)
            back = last_success + config.backtrack * (x - last_success)
            late = iteration - ascent
            if late < 0:
                search = ascend(x, gradient, min(0.002 * growth**iteration, 1) * root, config.norm).clamp(0, 1)
            elif late % 2:
                search = ascend(x, gradient, 0.1 * root, config.norm).clamp(0, 1)
            else:
                share = min(1, 2 * (late + 2) / (config.steps - ascent))
                search = images + share * (_pattern(late // 2, images, keys) - images)
            x = torch.where(success, onwards, torch.where(started, back, search))
            if late >= 0:
                halvings = torch.where(success & ~started, HALVINGS, halvings)
                x = torch.where(halvings > 0, (last_success + last_failure) / 2, x)
                halvings = halvings - 1
        success = loss_only(loss_of_images, x)[:, None, None, None] > 0
        return _nearer(success, x, images, best, smallest, config.norm)[0]

    return attack


def _pattern(number: int, images: Tensor, keys: Tensor) -> Tensor:
    """What ``images`` turn to at the ``number``-th try: a colour of full or no red, green and blue, or random cells.

    Black, white and the six between take turns with noise of 1, 2, 4, 8 or as many cells a side as there are pixels, of
    any value or of 0 and 1 alone.
    """
    turn = number // 2
    if number % 2 == 0:
        pattern = torch.empty_like(images)
        for channel, plane in enumerate(pattern.unbind(1)):
            plane.fill_((_COLOURS[turn % 8] >> channel % 3) & 1)
        return pattern
    cells = (1, 2, 4, 8, max(images.shape[2:]))[turn % 5]
    height, width = (min(cells, side) for side in images.shape[2:])
    noise = uniform(restarted(keys, number), images.new_empty(*images.shape[:2], height, width))
    noise = noise.round() if turn % 2 else noise
    return torch.empty_like(images).copy_(F.interpolate(noise, size=images.shape[2:]))


_COLOURS = (0b000, 0b111, 0b001, 0b110, 0b010, 0b101, 0b100, 0b011)


def prox_linf(d: Tensor, mu: Tensor | float) -> Tensor:
    """argmin_u max|u| + ‖u − d‖²/2μ over the values of each image of d [B, ...].

    It is d − (projection of d on the L1 ball of radius μ) (Moreau), which cuts every value at the level τ ≥ 0 where
    Σ max(|d| − τ, 0) = μ, and gives 0 where ‖d‖₁ ≤ μ.
    """
    size = d.abs().flatten(1).sort(descending=True).values
    mu = mu.view(-1, 1) if isinstance(mu, Tensor) else mu
    excess = size.cumsum(1, dtype=torch.float64) - mu
    count = torch.arange(1, size.shape[1] + 1, device=d.device)
    # the level if the k largest values are cut, Σ_{j≤k} |d_j| − μ over k, is highest at the right k
    level = (excess / count).amax(1).clamp(min=0).view(-1, *[1] * (d.dim() - 1)).to(d.dtype)
    return d.clamp(-level, level)


def prox_l2(d: Tensor, mu: Tensor | float) -> Tensor:
    """argmin_u ‖u‖₂ + ‖u − d‖²/2μ over each image of d [B, ...]: d, shortened by μ."""
    length = _length(d, "l2")
    return d * ((length - mu).clamp(min=0) / length.clamp(min=torch.finfo(d.dtype).tiny))


_PROX = {"linf": prox_linf, "l2": prox_l2}


def _length(d: Tensor, norm: Norm | Literal["l1"]) -> Tensor:
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm(d, order, dim=tuple(range(1, d.dim())), keepdim=True)


def _nearer(
    success: Tensor, x: Tensor, images: Tensor, best: Tensor, smallest: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    length = _length(x - images, norm)
    better = success & (length < smallest)
    return torch.where(better, x, best), torch.where(better, length, smallest)


__all__ = ["PLBConfig", "plb", "prox_l2", "prox_linf"]
