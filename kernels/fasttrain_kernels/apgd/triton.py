"""One step of APGD on a GPU: one program for each block of an image ("linf"), or for each image ("l2")."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels.apgd.reference import Norm, State
from fasttrain_kernels.apgd.rows import as_rows, unwritten

BLOCK = 1024


def apgd_step_triton(
    state: State,
    loss: Tensor,
    gradient: Tensor,
    images: Tensor,
    eps: float,
    norm: Norm,
    first: bool,
    window: int,
    momentum: float,
    rho: float,
) -> State:
    """As :func:`fasttrain_kernels.apgd.reference.apgd_step_reference`; float32."""
    after = unwritten(state)
    rows = as_rows(loss, gradient, images, *state, *after, like=state.x)
    rows = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in rows]
    numbers = float(eps), float(momentum), float(1 - momentum), float(rho * window)
    count, values = len(images), images[0].numel()
    kernel, blocks = (_linf, triton.cdiv(values, BLOCK)) if norm == "linf" else (_l2, 1)
    # products and sums are rounded apart, as the reference rounds them; memory is what the step waits for
    options = {"FIRST": first, "CHECKING": window > 0, "BLOCK": BLOCK, "enable_fp_fusion": False}
    kernel[(count, blocks)](*rows, *numbers, values, **options)
    return after


@triton.jit
def _linf(
    loss, gradient, images,
    x, previous, best, best_gradient, best_loss, last_loss, checked_loss, step_size, rises, halved,
    next_x, next_previous, next_best, next_best_gradient,
    next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
    eps, momentum, inertia, fewest_rises, values,
    FIRST: tl.constexpr, CHECKING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, block = tl.program_id(0), tl.program_id(1)
    improved, halves, size = _bookkeeping(
        i, block == 0, loss, best_loss, last_loss, checked_loss, step_size, rises, halved,
        next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
        fewest_rises, FIRST, CHECKING,
    )  # fmt: skip
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    at = i.to(tl.int64) * values + at
    here, along = _best_and_start(
        at, inside, improved, halves, x, gradient, best, best_gradient, next_previous, next_best, next_best_gradient
    )
    image = tl.load(images + at, inside, 0.0)
    low, high = tl.maximum(image - eps, 0.0), tl.minimum(image + eps, 1.0)
    sign = (along > 0).to(tl.float32) - (along < 0).to(tl.float32)
    z = _clamped(here + size * sign, low, high)
    if not FIRST:
        before = tl.load(previous + at, inside, 0.0)
        z = _clamped(here + momentum * (z - here) + inertia * (here - before), low, high)
    tl.store(next_x + at, z, inside)


@triton.jit
def _l2(
    loss, gradient, images,
    x, previous, best, best_gradient, best_loss, last_loss, checked_loss, step_size, rises, halved,
    next_x, next_previous, next_best, next_best_gradient,
    next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
    eps, momentum, inertia, fewest_rises, values,
    FIRST: tl.constexpr, CHECKING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Four sweeps over the image, or three without momentum: each length is known only at the end of a sweep."""
    i = tl.program_id(0)
    improved, halves, size = _bookkeeping(
        i, True, loss, best_loss, last_loss, checked_loss, step_size, rises, halved,
        next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
        fewest_rises, FIRST, CHECKING,
    )  # fmt: skip
    start = i.to(tl.int64) * values
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, values, BLOCK):
        inside = begin + tl.arange(0, BLOCK) < values
        at = start + begin + tl.arange(0, BLOCK)
        here, along = _best_and_start(
            at, inside, improved, halves, x, gradient, best, best_gradient, next_previous, next_best, next_best_gradient
        )
        squares += along * along
    size = size / (tl.sqrt(tl.sum(squares)) + 1e-12)

    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, values, BLOCK):
        inside = begin + tl.arange(0, BLOCK) < values
        at = start + begin + tl.arange(0, BLOCK)
        here, along, image = _read(at, inside, improved, halves, x, gradient, best, best_gradient, images)
        change = here + size * along - image
        squares += change * change
    length = tl.sqrt(tl.sum(squares))
    shrink = tl.minimum(length, eps) / (length + 1e-12)

    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, values, BLOCK):
        inside = begin + tl.arange(0, BLOCK) < values
        at = start + begin + tl.arange(0, BLOCK)
        here, along, image = _read(at, inside, improved, halves, x, gradient, best, best_gradient, images)
        z = _clamped(image + shrink * (here + size * along - image), 0.0, 1.0)
        if not FIRST:
            before = tl.load(previous + at, inside, 0.0)
            z = here + momentum * (z - here) + inertia * (here - before)
            squares += tl.where(inside, (z - image) * (z - image), 0.0)
        tl.store(next_x + at, z, inside)
    if not FIRST:
        length = tl.sqrt(tl.sum(squares))
        shrink = tl.minimum(length, eps) / (length + 1e-12)
        for begin in range(0, values, BLOCK):
            inside = begin + tl.arange(0, BLOCK) < values
            at = start + begin + tl.arange(0, BLOCK)
            image = tl.load(images + at, inside, 0.0)
            change = tl.load(next_x + at, inside, 0.0) - image  # each thread reads what it wrote
            tl.store(next_x + at, _clamped(image + shrink * change, 0.0, 1.0), inside)


@triton.jit
def _bookkeeping(
    i, writes, loss, best_loss, last_loss, checked_loss, step_size, rises, halved,
    next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
    fewest_rises, FIRST: tl.constexpr, CHECKING: tl.constexpr,
):  # fmt: skip
    """Whether image i's loss is its best, whether it returns there with half the step (0 or 1), its step size now."""
    now, top, last = tl.load(loss + i), tl.load(best_loss + i), tl.load(last_loss + i)
    checked, size = tl.load(checked_loss + i), tl.load(step_size + i)
    count, halves = tl.load(rises + i), tl.load(halved + i).to(tl.int32)
    improved = (now > top).to(tl.int32)
    top = tl.where(improved != 0, now, top)
    if not FIRST:
        count += (now > last).to(tl.int32)
        last = now
    returns = halves * 0
    if CHECKING:
        few = (count.to(tl.float32) <= fewest_rises).to(tl.int32)
        halves = few | ((1 - halves) & (checked >= top).to(tl.int32))
        size = tl.where(halves != 0, size * 0.5, size)
        returns = halves
        checked = top
        count = count * 0
    if writes:
        tl.store(next_best_loss + i, top)
        tl.store(next_last_loss + i, last)
        tl.store(next_checked_loss + i, checked)
        tl.store(next_step_size + i, size)
        tl.store(next_rises + i, count)
        tl.store(next_halved + i, halves.to(tl.uint8))
    return improved, returns, size


@triton.jit
def _read(at, inside, improved, returns, x, gradient, best, best_gradient, images):
    """Where the image stands, the gradient there, and the image."""
    elsewhere = tl.zeros_like(at) + returns * (1 - improved)  # a block: see _best_and_start
    from_best, from_x = inside & (elsewhere != 0), inside & (elsewhere == 0)
    here = tl.load(x + at, from_x, 0.0) + tl.load(best + at, from_best, 0.0)
    along = tl.load(gradient + at, from_x, 0.0) + tl.load(best_gradient + at, from_best, 0.0)
    return here, along, tl.load(images + at, inside, 0.0)


@triton.jit
def _best_and_start(
    at, inside, improved, returns, x, gradient, best, best_gradient, next_previous, next_best, next_best_gradient
):
    """Keep the best iterate and its gradient; the point from which the image moves on, and the gradient there."""
    here, along = tl.load(x + at, inside, 0.0), tl.load(gradient + at, inside, 0.0)
    kept = inside & (tl.zeros_like(at) + improved == 0)  # the interpreter cannot mask by (a block) & (a number)
    top = tl.where(improved != 0, here, tl.load(best + at, kept, 0.0))
    top_gradient = tl.where(improved != 0, along, tl.load(best_gradient + at, kept, 0.0))
    here, along = tl.where(returns != 0, top, here), tl.where(returns != 0, top_gradient, along)
    tl.store(next_best + at, top, inside)
    tl.store(next_best_gradient + at, top_gradient, inside)
    tl.store(next_previous + at, here, inside)
    return here, along


@triton.jit
def _clamped(y, low, high):
    """NaN stays."""
    return tl.where(y < low, low, tl.where(y > high, high, y))


__all__ = ["apgd_step_triton"]
