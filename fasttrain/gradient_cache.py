"""The loss of an optimiser step's whole batch, in the memory of one micro-batch: gradient caching (Gao et al. 2021).

A contrastive loss couples the images of its batch: its mean over micro-batches is another loss, with fewer negatives.
But it sees an image through its embedding alone. With x_a the micro-batches a = 1 … A of this rank, z_a = f(x_a; θ)
their embeddings, Z those of the whole batch and L = 1/W Σ_r L_r(Z) its loss over W ranks::

    1.  z_a = f(x_a; θ)                                      without a graph; the embeddings are kept
    2.  g = ∂(Σ_r L_r)/∂Z                                    by the objectives, which gather, and sum in the adjoint
    3.  ∂L/∂θ = 1/(A W) Σ_r Σ_a ∂/∂θ A ⟨g_a, f(x_a; θ)⟩      each micro-batch encoded again, with its graph

1/A and 1/W are DeepSpeed's averages over micro-batches and ranks. This is the unsplit batch's gradient to rounding, so
clipping, loss scaling and ZeRO see what they would have seen. It costs one more forward pass. Images and embeddings of
the rank's whole batch are kept, activations of one micro-batch.

With a penalty λ/2 R, R = Σ_r Σ_a ρ_a and ρ_a(g_a; θ) ∝ ‖J_aᵀ g_a‖² (J_a the Jacobian of z_a by the images, so that
J_aᵀ g_a is the image gradient of L), R depends on θ through J_a, which is the micro-batch's own affair, and through g,
which is everybody's. With H the loss's Hessian by Z, Σ_a ⟨∂ρ_a/∂g_a, dg_a⟩ = Σ_a ⟨u_a, (H dZ)_a⟩ = ⟨H u, dZ⟩, so::

    2a. u_a = ∂ρ_a/∂g_a                                      each micro-batch encoded, differentiated twice
    2b. h = H u = ∂⟨g, u⟩/∂Z                                 of the embeddings' graph, across the ranks
    3.  A (⟨g_a + λ/2 h_a, f(x_a; θ)⟩ + λ/2 ρ_a(g_a; θ))     g and h constant

A term that comes to one loss an image needs none of this, whatever its view or penalty: its mean over micro-batches is
the whole batch's. It is taken in pass 3. Refused are attacks and finite differences on a loss that couples images: they
move images by the loss of a micro-batch.

The random state of a micro-batch's first pass is put back for its others; running statistics move in pass 3 alone.

f must mean the same for a micro-batch as for the batch. It does without BatchNorm and with BatchNorm in evaluation
mode. With BatchNorm over each rank's own micro-batch (``model.sync_bn=false``) the result is that of the unsplit batch
on A·W ranks with that BatchNorm. Statistics over the ranks (``model.sync_bn=true``) would have to be the whole batch's,
which no micro-batch knows: refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, frozen_statistics
from fasttrain.objectives import Objective, Traits, encode, traits
from fasttrain.objectives.objective import ROWS, Summand, with_traits
from fasttrain.step import Term, TrainStep
from fasttrain.views import clean

SURROGATE = "⟨g, z⟩"
"Name of the term that stands for the cached ones in pass 3."

Gradient = dict[int, Tensor]
"""By position among the embeddings; those that a loss does not use are left out."""


class Forward(NamedTuple):
    """A micro-batch on its way to the backward pass."""

    index: Tensor  # [B] positions in the data set
    loss: Tensor  # to backpropagate
    value: Tensor  # its mean over micro-batches and ranks is the loss of the step
    terms: dict[str, Tensor]  # what to log


def check_batchnorm(module: nn.Module) -> None:
    """Refuse a module whose micro-batches do not mean what they would in the whole batch.

    Raises:
        UsageError: a BatchNorm that trains with other statistics than those of each rank's micro-batch.
    """
    for name, layer in module.named_modules():
        # torch's own has no ``sync``, and would count pass 1 into its running statistics
        if isinstance(layer, _BatchNorm) and layer.training and getattr(layer, "sync", True):
            raise UsageError(
                f"train.loss_over=batch: no micro-batch knows the whole batch's statistics for BatchNorm {name}; set "
                "model.sync_bn=false (those of each rank's micro-batch) or train.loss_over=micro_batch",
                everywhere=True,
            )


def forwards(engine, batches: Sequence[Batch], autocast: torch.dtype | None) -> Iterator[Forward]:
    """Yield one optimiser step's micro-batches, each after its pass 3; ``engine.backward`` and ``step`` come next.

    Args:
        engine: DeepSpeed's, around a :class:`~fasttrain.step.TrainStep`.
        batches: as many as ``engine`` accumulates, equally large.
        autocast: the dtype that ``engine`` autocasts to; ``None``: it does not.

    Raises:
        UsageError: no term couples the images of the whole batch; another term couples those of a micro-batch.
    """
    module: TrainStep = engine.module
    with torch.autocast(batches[0].images.device.type, autocast, enabled=autocast is not None):
        micro_batches = [_MicroBatch(module, batch) for batch in batches]
        loss, cached, surrogates = _whole_batch(module, micro_batches)
    alone = [_one_loss_an_image(term) for term in module.terms if term.name not in cached]
    for micro_batch, surrogate in zip(micro_batches, surrogates, strict=True):
        micro_batch.restore_random_state()
        # the surrogate first: it encodes the clean view, whose random draws are to be those of pass 1
        backpropagated, terms = engine(micro_batch.batch, [Term(SURROGATE, surrogate, len(batches)), *alone])
        del terms[SURROGATE]
        value = loss + sum(term.weight * terms[term.name] for term in alone)
        yield Forward(micro_batch.batch.index, backpropagated, value, cached | terms)


class _MicroBatch:
    """A micro-batch that can be encoded again: with the same random draws, and no trace in running statistics."""

    def __init__(self, module: TrainStep, batch: Batch) -> None:
        self.module, self.batch = module, batch
        self._device = batch.images.device
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        with torch.no_grad():
            encoded, self.prepared = self.encode()
        wide = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in _embeddings(encoded))
        self.encoded = _with_embeddings(encoded, wide)

    def restore_random_state(self) -> None:
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random, self._device)

    def encode(self) -> tuple[Encoded, Batch]:
        """The clean view, encoded as the module's terms ask for it, and the prepared batch."""
        self.restore_random_state()
        with frozen_statistics():
            batch = self.module.prepare(self.batch) if self.module.prepare is not None else self.batch
            sharing = [term.objective for term in self.module.terms if term.view is clean]
            return encode(self.module.encoder, batch.images.flatten(0, 1), sharing), batch


class _Part(NamedTuple):
    """A summand of a term over the whole batch: weight · L + penalty · R, with g = ∂L/∂Z."""

    term: Term
    summand: Summand
    loss: Tensor
    gradient: Gradient  # in the embeddings' graph where there is a penalty


class _Penalty(NamedTuple):
    """A micro-batch's share ρ_a(g_a; θ) of a summand's R, and the factors before it."""

    term: Term
    summand: Summand
    gradient: Gradient

    @property
    def weight(self) -> float:
        return self.term.weight * self.summand.penalty

    def of_constant(self, requires_grad: bool = False) -> _Penalty:
        """The same with g_a outside the graph."""
        return self._replace(gradient={k: g.detach().requires_grad_(requires_grad) for k, g in self.gradient.items()})

    def value(self, encoded: Encoded, batch: Batch) -> Tensor:
        return self.summand.regulariser(self.summand.loss, _inner(self.gradient, encoded), encoded, batch)


def _whole_batch(
    module: TrainStep, micro_batches: list[_MicroBatch]
) -> tuple[Tensor, dict[str, Tensor], list[Objective]]:
    """Pass 2: the cached terms' weighted sum, their values, and what stands for the sum in each micro-batch."""
    views, count = len(micro_batches[0].batch.images), len(micro_batches)
    kept = zip(*[_embeddings(one.encoded) for one in micro_batches], strict=True)
    leaves = [_joined(parts, views).requires_grad_() for parts in kept]
    whole = _with_embeddings(micro_batches[0].encoded, iter(leaves))
    parts = _parts(module, whole, _joined_batch([one.prepared for one in micro_batches]), leaves)

    values: dict[str, Tensor] = {}
    total: Gradient = {}
    penalties: list[list[_Penalty]] = [[] for _ in micro_batches]
    for term, summand, loss, gradient in parts:
        _add(values, {term.name: loss}, summand.weight)
        _add(total, gradient, term.weight * summand.weight)
        if summand.penalty:
            for mine, part in zip(penalties, _split(gradient, views, count), strict=True):
                mine.append(_Penalty(term, summand, part))
    if any(penalties):
        slope = 0.0
        for micro_batch, mine in zip(micro_batches, penalties, strict=True):
            slope = slope + _slope(micro_batch, mine, values)
        _add(total, _gradient(slope, leaves))

    full_precision = any(traits(term.objective).full_precision for term in module.terms if term.view is clean)
    wanted = Traits(image_gradient=any(penalties), full_precision=full_precision)
    surrogates = [
        with_traits(_surrogate(linear, [penalty.of_constant() for penalty in mine]), wanted)
        for linear, mine in zip(_split(total, views, count), penalties, strict=True)
    ]
    loss = sum(term.weight * values[term.name] for term in module.terms if term.name in values)
    return loss, values, surrogates


def _parts(module: TrainStep, whole: Encoded, batch: Batch, leaves: list[Tensor]) -> list[_Part]:
    """All that sees the images through their clean embeddings alone, up to penalties."""
    parts: list[_Part] = []
    couples = False
    for term in module.terms:
        asked = traits(term.objective)
        if term.view is not clean or (asked.image_gradient and not asked.summands):
            continue
        for summand in asked.summands or (Summand(term.objective),):
            losses = summand.loss(whole, batch)
            if losses.dim() and asked.image_gradient:
                break  # each image has its own penalty, which its micro-batch knows
            couples |= not losses.dim()
            loss = losses.mean()
            parts.append(_Part(term, summand, loss.detach(), _gradient(loss, leaves, create_graph=summand.penalty > 0)))
    if not couples:
        raise UsageError(
            "train.loss_over=batch: no term compares the clean images of a batch (losses an image need no whole batch; "
            "an attack or a finite difference sees its micro-batch's loss): set train.loss_over=micro_batch",
            everywhere=True,
        )
    return parts


def _slope(micro_batch: _MicroBatch, penalties: list[_Penalty], values: dict[str, Tensor]) -> Tensor:
    """Pass 2a: Σ weight ⟨g_a, u_a⟩, in the graph of g_a alone; the penalties are added to the terms' ``values``."""
    encoded, batch = micro_batch.encode()
    slope = 0.0
    for penalty in penalties:
        at = penalty.of_constant(requires_grad=True)
        value = at.value(encoded, batch)
        u = torch.autograd.grad(value, list(at.gradient.values()), retain_graph=True)
        slope = slope + penalty.weight * sum(
            (g * u_k).sum() for g, u_k in zip(penalty.gradient.values(), u, strict=True)
        )
        name = penalty.term.name
        _add(values, {name: value, f"penalty/{name}": value}, penalty.summand.penalty)
    return slope


def _surrogate(linear: Gradient, penalties: list[_Penalty]) -> Objective:
    """⟨g + h, z⟩ + Σ weight · ρ(g), whose parameter gradient is the cached terms' for one micro-batch."""

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        value = _inner(linear, encoded)
        for penalty in penalties:
            value = value + penalty.weight * penalty.value(encoded, batch)
        return value

    return objective


def _one_loss_an_image(term: Term) -> Term:
    """``term``, which must not couple the images of its micro-batch."""

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        losses = term.objective(encoded, batch)
        if not losses.dim():
            raise UsageError(
                f"train.loss_over=batch: the view or the penalty of term {term.name} knows its micro-batch's loss, not "
                "the whole batch's; use the clean view and penalty.method=double_backward, or "
                "train.loss_over=micro_batch",
                everywhere=True,
            )
        return losses

    return term._replace(objective=with_traits(objective, traits(term.objective)))


def _embeddings(encoded: Encoded) -> list[Tensor]:
    own = [z for name in ROWS if (z := getattr(encoded, name)) is not None]
    return own + [z for layer in encoded.layers for z in _embeddings(layer)]


def _with_embeddings(like: Encoded, values: Iterator[Tensor]) -> Encoded:
    """An encoding of ``values`` and nothing else, with the members that ``like`` has."""
    own = {name: next(values) if getattr(like, name) is not None else None for name in ROWS}
    layers = tuple(_with_embeddings(layer, values) for layer in like.layers)
    return Encoded(images=None, stages=(), **own, layers=layers)


def _inner(gradient: Gradient, encoded: Encoded) -> Tensor:
    """⟨g, z⟩."""
    z = _embeddings(encoded)
    return sum((g * z[k]).sum() for k, g in gradient.items())


def _gradient(loss: Tensor, leaves: list[Tensor], create_graph: bool = False) -> Gradient:
    found = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    return {k: g for k, g in enumerate(found) if g is not None}


def _add(total: dict, more: dict, weight: float = 1.0) -> None:
    for key, x in more.items():
        total[key] = total.get(key, 0.0) + weight * x.detach()


def _joined(parts: Sequence[Tensor], views: int) -> Tensor:
    """A of [V·B, ...], view-major -> [V·A·B, ...]."""
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], 1).flatten(0, 1)


def _split(gradient: Gradient, views: int, count: int) -> list[Gradient]:
    """The inverse: of [V·A·B, ...] the A parts [V·B, ...]."""
    cut = {k: g.unflatten(0, (views, count, -1)).transpose(0, 1).flatten(1, 2) for k, g in gradient.items()}
    return [{k: g[a] for k, g in cut.items()} for a in range(count)]


def _joined_batch(batches: list[Batch]) -> Batch:
    """All of the batches but their images."""
    targets = None
    if batches[0].targets is not None:
        targets = _joined([batch.targets for batch in batches], len(batches[0].images))
    labels, index = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "index"))
    return Batch(images=None, labels=labels, index=index, targets=targets)
