"""FAB: the nearest misclassified image, by steps onto the linearised boundary (Croce & Hein, ICML 2020).

Toward a target class t, from the iterate x of an image with label y, the boundary z_t − z_y = 0 of the logits z is
taken for the hyperplane that it is to first order. The iterate and the image are both projected on it, within [0, 1],
and a little beyond; the next iterate is a mixture of the two, more of the image's the further the iterate has gone.
From a misclassified iterate the search goes a tenth of the way back to the image.

Projecting
    In either norm the shortest d with <g, d> = r > 0 and p + d in [0, 1] is d_i = sign(g_i) min(t s_i, room_i), where
    room_i is how far p_i can go in the direction of g_i, s_i = 1 for L-inf and |g_i| for L2 (the conditions of Karush,
    Kuhn and Tucker; t is the multiplier), and one number t is left to be found, that for which

        φ(t) = Σ |g_i| min(t s_i, room_i) = r.

    φ is increasing, concave and piecewise linear, with φ(0) = 0. A tangent of it lies above it, so Newton's method from
    0 never passes the solution, goes up from pass to pass, and ends on the piece where the solution lies, exactly.
    What is still missing, times the slope, falls to a quarter or less with every pass. Gradients of networks take one
    to four; ten come within a thousandth of r even where nearly all of what can be moved must be. Nothing is sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.attacks.evaluation import loss_and_gradient
from fasttrain.attacks.losses import lead
from fasttrain.attacks.search import Cases, Found, Search, Standing, Victim
from fasttrain.attacks.threat import Threat
from fasttrain_kernels.apgd import Norm

IMAGES_SHARE, BEYOND, BACK = 0.1, 1.05, 0.9
"The published α_max, η and β: most of the image's projection in a mixture, overshooting, and what a way back leaves."
PASSES = 10
"Of Newton's method, at most: on a GPU all of them, so that the host does not wait."


def fab(threat: Threat, steps: int) -> Search:
    """FAB toward ``cases.targets``: an image falls when a misclassified iterate lies within ``threat.eps`` of it.

    Starts at the image, as AutoAttack's standard version does, and costs an image that does not fall ``steps`` times
    two forwards and an input gradient. What the published code goes on to find for an image that fell is not asked.

    It differs from the published code where that depends on the scale of the logits or loses digits: there, L2
    projections take gradients below 1e-8 for 0, and a hyperplane's offset is the difference of two large numbers. As
    there, an image counts as fallen only if its distance is at most eps as it is computed, without any slack.
    """

    def search(victim: Victim, cases: Cases) -> Found:
        standing = Standing(victim, cases)
        x = cases.images

        def ahead(x: Tensor) -> Tensor:
            scores = victim.logits(x)
            standing.note_bad(scores.detach())
            return lead(scores, standing.cases.labels, standing.cases.targets)

        for _ in range(steps):
            value, gradient = loss_and_gradient(ahead, x)
            standing.note(gradient)
            here = standing.cases
            with torch.no_grad():
                x = to_boundary(x, here.images, value, gradient, threat.norm)
                scores = victim.logits(x)
                within = length(x - here.images, threat.norm) <= threat.eps
                if standing.strike(x, scores, within):
                    break
                wrong = _spread(scores.argmax(1) != here.labels)
                (x,) = standing.shrink(torch.where(wrong, torch.lerp(here.images, x, BACK), x))
        return standing.found

    return search


def to_boundary(x: Tensor, images: Tensor, value: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """The iterate that follows x [B, ...], where what is to become 0 is ``value`` [B] and has this gradient."""
    there = value + _sum(gradient * (images - x))
    change = projection(torch.cat((x, images)), torch.cat((gradient, gradient)), -torch.cat((value, there)), norm)
    size, images_size = length(change, norm).clamp_min(1e-8).chunk(2)
    share = (size / (size + images_size)).clamp_max(IMAGES_SHARE)
    change, images_change = change.chunk(2)
    return torch.lerp(x + BEYOND * change, images + BEYOND * images_change, _spread(share)).clamp(0, 1)


def projection(points: Tensor, w: Tensor, amount: Tensor, norm: Norm) -> Tensor:
    """The shortest changes d [B, ...] of points p in [0, 1] with <w, d> = amount [B] and p + d in [0, 1].

    Where no d is large enough, the largest; where w is 0, no change.
    """
    largest = w.abs().amax((1, 2, 3))
    scale = torch.where(largest > 0, largest, 1)
    scale = torch.where(amount < 0, -scale, scale)
    g, amount = w / _spread(scale), amount / scale
    size = g.abs()
    room = torch.where(g > 0, 1 - points, points)
    if norm == "linf":
        t = _solution(size, room, size * room, amount)
        return g.sign() * torch.minimum(_spread(t), room)
    t = _solution(size * size, room / size, size * room, amount)
    return g.sign() * torch.minimum(_spread(t) * size, room)


def _solution(rate: Tensor, full: Tensor, volume: Tensor, amount: Tensor) -> Tensor:
    """The least t [B] with Σ rate min(t, full) = amount, ``volume`` being rate · full; huge where there is none."""
    t, none = torch.zeros_like(amount), rate.new_zeros(())
    for _ in range(PASSES):
        rising = full > _spread(t)
        missing = amount - _sum(torch.where(rising, none, volume))
        slope = _sum(torch.where(rising, rate, none))
        before, t = t, torch.maximum(t, (missing / slope).nan_to_num(0))
        if _read_for_nothing(t) and torch.equal(t, before):  # and so it stays
            break
    return t


def _read_for_nothing(x: Tensor) -> bool:
    return x.device.type == "cpu"


def length(change: Tensor, norm: Norm) -> Tensor:
    """Of each image of [B, 3, H, W], as the published code takes it."""
    return change.abs().amax((1, 2, 3)) if norm == "linf" else _sum(change.square()).sqrt()


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 2, 3))


def _spread(x: Tensor) -> Tensor:
    return x[:, None, None, None]


__all__ = ["fab", "projection", "to_boundary"]
