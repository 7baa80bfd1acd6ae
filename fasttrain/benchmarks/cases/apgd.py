"""One step of APGD's bookkeeping, at a checkpoint, where all of it is done."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fasttrain.benchmarks.cases import OURS, REFERENCE, Case, Results
from fasttrain.benchmarks.ceilings import Work
from fasttrain_kernels.apgd import Norm, State, apgd_step

EPS = {"linf": 8 / 255, "l2": 2.0}
WINDOW = 3
FULL = 10
"""Full-size tensors read and written: x, the one before, the images and the gradient; the best and its gradient, both
ways; the next x, and the x that it started from, which a return to the best has changed."""


def apgd_cases(images: int, pixels: int, device: torch.device) -> Iterator[Case]:
    """L∞ and L2 on colour images, float32; of all images about half improve and half halve their step."""
    shape = (images, 3, pixels, pixels)
    for norm, eps in EPS.items():
        centre = torch.rand(shape, device=device)
        x, previous, best = ((centre + eps / 4 * torch.randn_like(centre).sign()).clamp(0, 1) for _ in range(3))
        gradient, best_gradient = torch.randn(2, *shape, device=device)
        loss, best_loss, last_loss, checked_loss = torch.rand(4, images, device=device)
        rises = torch.randint(WINDOW, (images,), dtype=torch.int32, device=device)
        step_size, halved = torch.full_like(loss, eps), rises > WINDOW
        state = State(x, previous, best, best_gradient, best_loss, last_loss, checked_loss, step_size, rises, halved)
        given, step = (loss, gradient, centre), partial(_step, norm, eps)
        yield Case(
            f"APGD step, {norm}",
            "one pass",
            "x".join(map(str, shape)),
            torch.float32,
            Work(0, FULL * x.numel() * x.element_size()),
            ("x", "best", "its gradient", "step size"),
            partial(step, State(*map(_double, state)), *map(_double, given), "reference"),
            {OURS: partial(step, state, *given, "auto"), REFERENCE: partial(step, state, *given, "reference")},
        )


def _step(norm: Norm, eps: float, state: State, loss: Tensor, gradient: Tensor, images: Tensor, impl: str) -> Results:
    after = apgd_step(state, loss, gradient, images, eps, norm, window=WINDOW, impl=impl)
    return after.x, after.best, after.best_gradient, after.step_size


def _double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values
