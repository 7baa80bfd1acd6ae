"""Random numbers of an image as a pure function of its key: the same on any rank, in any batch, after any resume.

The generator is SplitMix64 (Steele, Lea & Flood 2014): word j of an image is ``mix(mix(key) + (j + 1) γ)``, computed
where the images lie, in 64-bit integers, so a start costs no transfer and no synchronisation.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)


def image_keys(seed: int, step: int | Tensor, index: Tensor) -> Tensor:
    """Keys [B] int64 of the images ``index`` [B] (positions in the data set) at one step of training.

    A step that is a tensor (int64, of one element) is not read on the host.
    """
    step = step.to(index.device) if isinstance(step, Tensor) else step
    return _mix(_mix(_mix(seed) + step) + index.to(torch.int64))


def restarted(keys: Tensor, restart: int) -> Tensor:
    """Other keys for another start of the same images; restart 0 keeps them."""
    return keys if restart == 0 else _mix(keys + restart)


def uniform(keys: Tensor, like: Tensor) -> Tensor:
    """Uniform numbers k/2²⁴ in [0, 1), of the shape, type and memory format of ``like`` [B, ...]."""
    return _shaped(_high_bits(words(keys.to(like.device), math.prod(like.shape[1:]))), like)


def normal(keys: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers (Box-Muller), of the shape, type and memory format of ``like`` [B, ...]."""
    drawn = words(keys.to(like.device), math.prod(like.shape[1:]))
    radius = (-2 * (1 - _high_bits(drawn)).log()).sqrt()
    return _shaped(radius * (2 * math.pi * _high_bits(drawn << 32)).cos(), like)


def words(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """64 random bits each, [B, count] int64: each image's words from number ``first`` on."""
    counter = torch.arange(first + 1, first + count + 1, device=keys.device) * _signed(_GAMMA)
    return _mix(_mix(keys)[:, None] + counter)


def below(drawn: Tensor, limit: int) -> Tensor:
    """Uniform integers from 0 to limit − 1, at most 2³¹, of the words' high bits."""
    return _shifted(drawn, 32) * limit >> 32


def signs(drawn: Tensor, count: int) -> Tensor:
    """±1 int64 [..., count] of the lowest bits of words [...]."""
    return ((drawn[..., None] >> torch.arange(count, device=drawn.device)) & 1) * 2 - 1


_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: Word) -> Word:
    z = _wrapped(z)
    z = _wrapped((z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9))
    z = _wrapped((z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB))
    return z ^ _shifted(z, 31)


def _wrapped(z: Word) -> Word:
    """64 bits of it, which is all that a tensor's words have."""
    return z if isinstance(z, Tensor) else _signed(z)


def _shifted(z: Word, bits: int) -> Word:
    """Right shift of the word as an unsigned one: PyTorch's keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


def _high_bits(words: Tensor) -> Tensor:
    return _shifted(words, 40).to(torch.float32) * 2.0**-24


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(values.view(like.shape))
