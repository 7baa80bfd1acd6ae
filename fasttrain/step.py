"""TrainStep: the weighted sum of terms, inside the one module that DeepSpeed wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.data import Batch
from fasttrain.models import Encoded, Encoder, frozen_statistics
from fasttrain.objectives import Objective, encode, traits
from fasttrain.views import View, clean


class Term(NamedTuple):
    """One summand of the loss: ``weight * objective(encode(view(batch)), batch)``; of weight 0 it is only reported."""

    name: str
    objective: Objective
    weight: float = 1.0
    view: View = clean


class TrainStep(nn.Module):
    """Batch -> loss: ``sum_i weight_i * mean(objective_i(encode(view_i(batch)), batch))``.

    The objective has to live inside the module that DeepSpeed wraps: ``autograd.grad`` on the output of a wrapped
    encoder raises under most ZeRO stages and is silently wrong under one. Terms that share a view share its encoding.
    All V views are encoded together, so train-mode BatchNorm sees the statistics of all of them.

    Args:
        encoder: what is trained.
        terms: summands; a view that is a module (an adversary with parameters of its own) is trained and saved too.
        prepare: done to each batch once, before any view; a module (a frozen reference encoder, say) is saved too.
    """

    def __init__(
        self, encoder: Encoder, terms: Sequence[Term], prepare: Callable[[Batch], Batch] | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.terms = tuple(terms)
        self.prepare = prepare
        self.views = nn.ModuleDict({term.name: term.view for term in terms if isinstance(term.view, nn.Module)})

    def forward(self, batch: Batch, terms: Sequence[Term] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (scalar) and what to log of it, detached: each term's own value (unweighted) by its name,
        what of it is a penalty as ``penalty/<term>``, and what its view reports as ``view/<term>/<name>``.

        Args:
            terms: to be summed in place of the module's own.
        """
        terms = self.terms if terms is None else terms
        if self.prepare is not None:
            batch = self.prepare(batch)
        encodings: dict[View, tuple[Encoded, Batch]] = {}
        loss, values = 0.0, {}
        for term in sorted(terms, key=lambda term: not term.weight):  # an encoding with a graph serves the others too
            with nullcontext() if term.weight else _untrained():
                if term.view not in encodings:
                    seen = term.view(self.encoder, batch)
                    sharing = [other.objective for other in terms if other.view == term.view]
                    encodings[term.view] = encode(self.encoder, seen.images.flatten(0, 1), sharing), seen
                value = term.objective(*encodings[term.view]).mean()
            values[term.name] = value.detach()
            values |= {f"{part}/{term.name}": scalar for part, scalar in traits(term.objective).scalars.items()}
            if term.weight:
                loss = loss + term.weight * value
        for name, view in self.views.items():
            scalars = view.scalars() if hasattr(view, "scalars") else {}
            values |= {f"view/{name}/{key}": scalar for key, scalar in scalars.items()}
        return loss, values


@contextmanager
def _untrained() -> Iterator[None]:
    """Within it nothing leaves a trace: neither a graph nor running statistics."""
    with torch.no_grad(), frozen_statistics():
        yield
