"""Tikhonov regularisation: the squared norm of a loss's gradient by the images, added to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain.data import Batch
from fasttrain.distributed import all_reduce, world_size
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, frozen_statistics
from fasttrain.objectives.layers import at_layer
from fasttrain.objectives.objective import Objective, Summand, Traits, traits, with_traits
from fasttrain_kernels.wanted import wanted_gradients

Method = Literal["double_backward", "finite_difference"]
Scheme = Literal["forward", "central"]
Precision = Literal["autocast", "fp32"]

Regulariser = Callable[[Objective, Tensor, Encoded, Batch], Tensor]
"""(objective, its value on this batch, encoded views, batch) -> R, of that value's shape."""


def gradient_penalty(
    of: Objective,
    weight: float,
    method: Method = "double_backward",
    *,
    step: float = 1e-2,
    scheme: Scheme = "forward",
    precision: Precision = "autocast",
) -> Objective:
    """L + λ/2 R, with R the squared L2 norm of L's gradient by the images in [0, 1] (Campbell et al. 2020, eqs. 2, 3).

    λ/2 R is logged by itself too (``traits(…).scalars["penalty"]``). What R is follows from what the objective returns:

    - One loss an image or row, ℓ_i (cross-entropy, SimSiam): E[ℓ + λ/2 ‖∇ₓℓ‖²]. The gradient's rows are those of the
      *sum*, g = ∇ₓ Σ_i ℓ_i over the global batch, and R_i = ‖g_i‖² (averaged over the views, where ℓ_i has several).
      Under train-mode BatchNorm g_i holds, besides ∇ℓ_i, what image i does to the others.
    - A scalar (NT-Xent, SupCon): R = Σ_k (‖∇_{x̃₂ₖ₋₁} L‖² + ‖∇_{x̃₂ₖ} L‖²) / 2 (for V views, Σ / V), with L the mean
      over the *global* batch and k over all its images.

    Over ranks: the adjoints of gathers and BatchNorm sum the W ranks' losses, so ∂L_r/∂x computed on rank r is W times
    that of the global mean L. This returns L_r + λ/2 R_r with R_r = W/V Σ_{rank r} ‖∂L_r/∂x / W‖²; its value and its
    parameter gradient, averaged over ranks as DeepSpeed does, are those of one process. Gradient accumulation is
    another matter: L of a contrastive objective is the micro-batch's, with fewer negatives, and R, which falls as
    1/images, is that L's. Value and gradient are then the mean over micro-batches, not those of the whole batch.

    ``double_backward`` is exact. ``finite_difference`` (Finlay & Oberman 2019) takes ordinary passes only: with d the
    detached, normalised gradient, R = ((L(x + h d) − L(x)) / h)², or "central" ((L(x + h d) − L(x − h d)) / 2h)² at one
    pass more. Losses an image move each image by its own d and difference its own loss; a scalar moves the global batch
    along the one d, and its parameter gradient at x comes from the pass that finds d. h (``step``) is the L2 length
    that an image moves, root-mean-square over the batch. The further passes use their own batch statistics and leave
    BatchNorm's running ones alone. This is another regulariser, not a cheap copy of the first: across ReLU's kinks its
    parameter gradient had cosine 0.03 (h = 1e-3), 0.31 (0.1), 0.68 (1) and 0.78 (3) with the exact one on ResNet-18 at
    initialisation, and agreed only in float64 with h ≤ 1e-5. With losses an image under train-mode BatchNorm not even
    then: there R_i tends to (Σ_j d_j · ∂ℓ_i/∂x_j)², which sums over the images that move, where g_i sums over the
    losses (cross-entropy, ResNet-18, 2 x 16 images: 1.22 times the value, cosine 0.89). In evaluation mode, and for the
    scalar objectives in either, the limit is exact.

    Precision under autocast: the convolutions' and products' passes, second ones too, run in the dtype of their
    forward; BatchNorm's statistics, the loss, the image gradient and its norms are float32, since squares of 10⁻⁵ and
    sums of 10⁵ of them do not survive in half precision. Where the penalty dominates, bf16 is 8 % off in the parameter
    gradient: ``precision="fp32"`` encodes this objective's views without autocast. A finite difference of bf16 losses
    is noise (2⁻⁸ / h), so that method demands fp32.

    Args:
        weight: λ ≥ 0; the papers use 0.1, 1 and 10.

    Raises:
        UsageError: a penalty of a penalty (its gradient is a third derivative, which cross-rank BatchNorm has not); a
            finite difference of an objective with a stop-gradient (its value's derivative is not its gradient), or
            under autocast; a value out of range.
    """
    _positive_or_zero("weight", weight)
    regulariser = _regulariser(of, method, step, scheme)
    scalars: dict[str, Tensor] = {}

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        losses = of(encoded, batch)
        if method == "finite_difference" and not losses.dim():
            losses = _differentiated(losses, encoded.images)  # one pass for the direction and the loss's own gradient
        penalty = weight / 2 * regulariser(of, losses, encoded, batch)
        scalars["penalty"] = penalty.detach().mean()
        return losses + penalty

    return with_traits(objective, _traits(of, precision, scalars, Summand(of, 1.0, weight / 2, regulariser)))


def layer_by_layer_penalty(
    of: Objective,
    alpha: Sequence[float],
    beta: Sequence[float],
    method: Method = "double_backward",
    *,
    step: float = 1e-2,
    scheme: Scheme = "forward",
    precision: Precision = "autocast",
) -> Objective:
    """Σ_k α_k L_k + Σ_k β_k R_k over the encoder's 4 stages (Campbell et al. 2020, eqs. 4, 5).

    L_k is the objective on stage k's own pooled head and R_k that of :func:`gradient_penalty` for L_k; β_k stands where
    λ/2 stands there. A stage with α_k = β_k = 0 costs nothing. All L_k come from one forward pass, all parameter
    gradients from one backward pass.

    Each R_k with β_k > 0 needs a gradient of its own: ‖·‖² is not linear, so the r gradients cannot travel as one sum.
    They share the forward graph, and R_k's goes through the stages up to k only. With all four, a step took 0.64 s,
    a penalty with its own forward pass for each stage 0.83 s, and all gradients in one pass (vmap over the r losses,
    which sends every loss through every stage, 16 for 10, and cannot cross ranks) 0.89 s; one penalty on the last
    stage 0.24 s, the plain loss 0.06 s (ResNet-18 at width 1/4, 2 x 16 images of 32 x 32, one core).

    Raises:
        UsageError: as :func:`gradient_penalty`; an encoder without ``model.layer_heads``.
    """
    for name, weights in (("alpha", alpha), ("beta", beta)):
        for k, weight in enumerate(weights):
            _positive_or_zero(f"{name}[{k}]", weight)
    if not any(alpha) and not any(beta):
        raise UsageError("layers.alpha and layers.beta are all 0: give at least one stage a weight")
    regulariser = _regulariser(of, method, step, scheme)
    scalars: dict[str, Tensor] = {}

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        total: Tensor | float = 0.0
        penalties: Tensor | float = 0.0
        for k, (a, b) in enumerate(zip(alpha, beta, strict=True)):
            if not a and not b:
                continue
            of_k = at_layer(of, k)
            losses = of_k(encoded, batch)
            total = total + a * losses
            if b:
                penalty = b * regulariser(of_k, losses, encoded, batch)
                total, penalties = total + penalty, penalties + penalty.detach().mean()
        if any(beta):
            scalars["penalty"] = penalties
        return total

    summands = [
        Summand(at_layer(of, k), a, b, regulariser) for k, (a, b) in enumerate(zip(alpha, beta, strict=True)) if a or b
    ]
    return with_traits(objective, _traits(of, precision, scalars, *summands))


def double_backward(of: Objective, losses: Tensor, encoded: Encoded, batch: Batch) -> Tensor:
    """R from the gradient itself, kept differentiable."""
    squares = _squared_norms(_image_gradient(losses, encoded.images, create_graph=True))
    if losses.dim():
        return squares.unflatten(0, (-1, len(losses))).mean(0)
    return squares.sum() / (len(squares) ** 2 * _views(encoded, batch) * world_size())


def finite_difference(step: float, scheme: Scheme) -> Regulariser:
    """R from the losses of images moved along the normalised gradient."""

    def regulariser(of: Objective, losses: Tensor, encoded: Encoded, batch: Batch) -> Tensor:
        images = encoded.images
        if encoded.features.dtype != images.dtype:
            raise UsageError(
                "penalty.method=finite_difference under autocast: half-precision losses differ by rounding alone; set "
                "penalty.precision=fp32",
                everywhere=True,
            )
        if images.is_cuda and torch.backends.cudnn.allow_tf32:
            raise UsageError(
                "penalty.method=finite_difference in TF32: losses differ by rounding alone; use train.precision=fp32, "
                "or bf16 with penalty.precision=fp32",
                everywhere=True,
            )
        shift = step * _direction(losses, images)

        def at(position: Tensor) -> Tensor:
            with frozen_statistics(), torch.autocast(images.device.type, enabled=False):
                return of(encoded.encoder(position), batch)

        if scheme == "central":
            slope = (at(images.detach() + shift) - at(images.detach() - shift)) / (2 * step)
        else:
            slope = (at(images.detach() + shift) - losses) / step
        if losses.dim():
            return slope.square() * (len(losses) / len(images)) ** 2
        rows = len(images) * world_size()
        slope = all_reduce(slope) / world_size()
        return slope.square() / (rows * _views(encoded, batch))

    return regulariser


def _image_gradient(losses: Tensor, images: Tensor, create_graph: bool) -> Tensor:
    """Gradient [V·B, ...] of Σ losses, or of V·B times the scalar: of order 1 an image, so that fp16 holds it."""
    total = losses.sum() if losses.dim() else losses * len(images)
    with torch.autocast(images.device.type, enabled=False):  # a backward operation takes its forward's dtype
        (gradient,) = torch.autograd.grad(total, images, create_graph=create_graph, retain_graph=True)
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _direction(losses: Tensor, images: Tensor) -> Tensor:
    """The gradient scaled to length √rows over the images of one loss, or of the global batch: an RMS of 1 an image."""
    gradient = _image_gradient(losses, images, create_graph=False)
    squares = _squared_norms(gradient)
    if losses.dim():
        mean = squares.unflatten(0, (-1, len(losses))).mean(0).repeat(len(images) // len(losses))
    else:
        mean = (all_reduce(squares.sum()) / (len(images) * world_size())).expand(len(images))
    scale = mean.rsqrt().masked_fill(mean == 0, 0)
    return gradient * scale.view(-1, *[1] * (gradient.dim() - 1))


def _squared_norms(gradient: Tensor) -> Tensor:
    """[N] of [N, ...], without a tensor of the squares; by dimensions, because flattening would copy channels-last."""
    return torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim()))).square()


def _differentiated(loss: Tensor, images: Tensor) -> Tensor:
    """The scalar ``loss``, whose gradient by the images and by every leaf that it depends on is computed here, once.

    A backward pass through the result scales what was found instead of passing through the network again. Over ranks
    that scale has to be the same on all, as a finite difference's is: the pass here sums the ranks' losses unscaled.
    """
    leaves = _leaves(loss, until=images)
    gradients = torch.autograd.grad(loss, [images, *leaves], retain_graph=True)
    return _KnownGradient.apply(loss.detach(), gradients, images, *leaves)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient by each of the inputs is given."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        asked = wanted_gradients(ctx)[2:]
        return None, None, *(g * scale if asks else None for g, asks in zip(ctx.gradients, asked, strict=True))


def _leaves(loss: Tensor, until: Tensor) -> list[Tensor]:
    """The leaves that the graph of ``loss`` ends in, without those behind ``until``."""
    leaves, seen = [], {torch.autograd.graph.get_gradient_edge(until).node}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _regulariser(of: Objective, method: Method, step: float, scheme: Scheme) -> Regulariser:
    _one_of("method", method, Method)
    _one_of("scheme", scheme, Scheme)
    if traits(of).image_gradient:
        raise UsageError("a penalty of a penalty needs third derivatives, which BatchNorm has not: keep one of the two")
    if method == "double_backward":
        return double_backward
    if traits(of).stops_gradients:
        raise UsageError(
            "penalty.method=finite_difference differences the value, whose derivative is not the gradient of an "
            "objective with a stop-gradient (simsiam): use penalty.method=double_backward"
        )
    if not step > 0:
        raise UsageError(f"penalty.step={step}: must be positive, for example 0.01")
    return finite_difference(step, scheme)


def _traits(of: Objective, precision: Precision, scalars: dict[str, Tensor], *summands: Summand) -> Traits:
    _one_of("precision", precision, Precision)
    of_gradient = all(summand.regulariser is double_backward for summand in summands)
    asked = summands if of_gradient else ()
    full, passes = precision == "fp32", traits(of).passes
    return Traits(image_gradient=True, full_precision=full, passes=passes, summands=asked, scalars=scalars)


def _one_of(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise UsageError(f"penalty.{name}={value}: choose one of {', '.join(get_args(choices))}")


def _views(encoded: Encoded, batch: Batch) -> int:
    return len(encoded.images) // len(batch.labels)


def _positive_or_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise UsageError(f"penalty.{name}={value}: must be 0 or more")
