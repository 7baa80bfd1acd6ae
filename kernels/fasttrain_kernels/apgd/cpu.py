"""One step of APGD on a CPU, image by image, compiled by numba; an image's values are read from memory once."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from fasttrain_kernels.apgd.reference import Norm, State
from fasttrain_kernels.apgd.rows import as_rows, unwritten
from fasttrain_kernels.threads import in_slices


def apgd_step_cpu(
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
    """As :func:`fasttrain_kernels.apgd.reference.apgd_step_reference`; float32 or float64, all of one type."""
    after = unwritten(state)
    arrays = [t.numpy() for t in as_rows(loss, gradient, images, *state, *after, like=state.x)]
    kind = arrays[0].dtype.type
    numbers = kind(eps), kind(momentum), kind(1 - momentum), kind(rho * window)

    def work(begin: int, end: int) -> None:
        _steps(begin, end, *arrays, *numbers, norm == "linf", first, window > 0)

    in_slices(len(images), work)
    return after


@njit(nogil=True, cache=True)
def _steps(
    begin, end, loss, gradient, images,
    x, previous, best, best_gradient, best_loss, last_loss, checked_loss, step_size, rises, halved,
    next_x, next_previous, next_best, next_best_gradient,
    next_best_loss, next_last_loss, next_checked_loss, next_step_size, next_rises, next_halved,
    eps, momentum, inertia, fewest_rises, linf, first, checking,
):  # fmt: skip
    for i in range(begin, end):
        improved = loss[i] > best_loss[i]
        if improved:
            top, top_gradient, top_loss = x[i], gradient[i], loss[i]
        else:
            top, top_gradient, top_loss = best[i], best_gradient[i], best_loss[i]
        next_best[i], next_best_gradient[i], next_best_loss[i] = top, top_gradient, top_loss

        count = rises[i]
        if not first and loss[i] > last_loss[i]:
            count += 1
        next_last_loss[i] = last_loss[i] if first else loss[i]

        here, along, size, checked, halves = x[i], gradient[i], step_size[i], checked_loss[i], halved[i]
        if checking:
            halves = count <= fewest_rises or (not halves and checked >= top_loss)
            checked, count = top_loss, 0
            if halves:
                here, along, size = top, top_gradient, size * x.dtype.type(0.5)
        next_previous[i] = here
        next_step_size[i], next_checked_loss[i], next_rises[i], next_halved[i] = size, checked, count, halves

        if linf:
            _move_linf(next_x[i], here, along, previous[i], images[i], size, eps, momentum, inertia, first)
        else:
            _move_l2(next_x[i], here, along, previous[i], images[i], size, eps, momentum, inertia, first)


@njit(nogil=True, cache=True)
def _move_linf(out, x, gradient, previous, image, size, eps, momentum, inertia, first):
    kind = x.dtype.type
    for j in range(len(x)):
        low, high = max(image[j] - eps, kind(0)), min(image[j] + eps, kind(1))
        sign = kind(gradient[j] > 0) - kind(gradient[j] < 0)
        z = _clamped(x[j] + size * sign, low, high)
        if not first:
            z = _clamped(x[j] + momentum * (z - x[j]) + inertia * (x[j] - previous[j]), low, high)
        out[j] = z


@njit(nogil=True, cache=True)
def _move_l2(out, x, gradient, previous, image, size, eps, momentum, inertia, first):
    size = size / (_length(gradient) + x.dtype.type(1e-12))
    for j in range(len(x)):
        out[j] = x[j] + size * gradient[j] - image[j]
    _to_ball(out, image, eps)
    if not first:
        for j in range(len(x)):
            out[j] = x[j] + momentum * (out[j] - x[j]) + inertia * (x[j] - previous[j]) - image[j]
        _to_ball(out, image, eps)


@njit(nogil=True, cache=True)
def _to_ball(change, image, eps):
    """From x − image to the projection of x, in place."""
    kind = change.dtype.type
    length = _length(change)
    scale = min(length, eps) / (length + kind(1e-12))
    for j in range(len(change)):
        change[j] = _clamped(image[j] + scale * change[j], kind(0), kind(1))


@njit(nogil=True, cache=True)
def _clamped(y, low, high):
    """NaN stays."""
    return low if y < low else high if y > high else y


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _length(values):
    """Summed in float64, in any order."""
    total = 0.0
    for value in values:
        total += np.float64(value) * np.float64(value)
    return values.dtype.type(np.sqrt(total))


__all__ = ["apgd_step_cpu"]
