"""Square Attack: random search that recolours squares (Andriushchenko, Croce, Flammarion & Hein, ECCV 2020).

::

    image ── a random start at the ball's edge ── a square proposed ── kept if the margin rose ── a square proposed …

Uses no gradients. L-inf: the start is stripes a pixel wide, and a proposal sets each channel within a square to
image ± eps. L2: the start is a tiling of bumps, and a proposal takes the change out of one window and puts its length,
and what is left of the ball, into a bump in another. Squares become smaller after certain numbers of queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.attacks.losses import margin
from fasttrain.attacks.noise import below, restarted, signs, words
from fasttrain.attacks.search import Cases, Found, Search, Standing, Victim
from fasttrain.attacks.threat import Threat

SHARE = 0.8
"The published p: the share of the image that the first squares cover."
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"The queries, counted from 0, after which that share is halved."
BLOCK = 64
"Queries whose random numbers are drawn at once, at most."


class Moves(NamedTuple):
    """Random numbers of Q queries with squares of one size."""

    row: Tensor  # [B, Q] int64: where the square begins
    column: Tensor  # [B, Q] int64
    rows: Tensor  # [B, Q, 2, H]: 1 in those of the square, and in those of the window that L2 empties, else 0
    columns: Tensor  # [B, Q, 2, W]
    sign: Tensor  # [B, Q, C]: of each channel's change
    turned: Tensor  # [B, Q] int64: 1 where a bump is transposed

    def at(self, query: int) -> Moves:
        """Without the dimension Q."""
        return Moves(*(x[:, query] for x in self))


def square(threat: Threat, queries: int) -> Search:
    """Square Attack on the margin: an image falls when the start or a proposal is misclassified.

    Costs an image that does not fall ``queries`` + 1 forwards. As in AutoAttack's standard version, when squares become
    smaller does not depend on ``queries``.

    Where squares lie, their signs, and how bumps are turned are functions of the image's key and the number of the
    query alone. The published code draws places and turns once for the whole batch, and its squares never reach the
    last row or column; here each image has its own, anywhere. There an image of margin 0 is let go, even if it stands.
    """
    start, propose = (_stripes, _recoloured) if threat.norm == "linf" else (_tiles, _moved)
    least = 1 if threat.norm == "linf" else 3

    @torch.no_grad()
    def search(victim: Victim, cases: Cases) -> Found:
        standing, like = Standing(victim, cases), cases.images
        images = like.contiguous()  # masks of pixels spread over channels: cheap if those lie outermost
        best = start(images, cases.keys, threat.eps)
        scores = victim.logits(_laid_out(best, like))
        if standing.strike(best, scores):
            return standing.found
        highest = margin(scores, cases.labels)
        for first, count in blocks(queries):
            side = side_of(first, images, least)
            moves = _moves(standing.cases, first, count, side)
            for query in range(count):
                x = propose(best, images, moves.at(query), side, threat.eps)
                scores = victim.logits(_laid_out(x, like))
                if standing.strike(x, scores):
                    return standing.found
                risen = margin(scores, standing.cases.labels)
                best = torch.lerp(best, x, (risen > highest).to(x.dtype)[:, None, None, None])
                images, best, highest, *kept = standing.shrink(images, best, torch.maximum(risen, highest), *moves)
                moves = Moves(*kept)
        return standing.found

    return search


def blocks(queries: int) -> Iterator[tuple[int, int]]:
    """(First query, number of queries): at most BLOCK, with squares of one size."""
    edges = [0, *(after + 1 for after in HALVED if after + 1 < queries), queries]
    for begin, end in pairwise(edges):
        for first in range(begin, end, BLOCK):
            yield first, min(BLOCK, end - first)


def side_of(query: int, images: Tensor, least: int) -> int:
    """Of the square, in pixels; of L2's windows, which are not smaller than 3, odd unless the image is smaller."""
    height, width = images.shape[2:]
    share = SHARE / 2 ** sum(query > after for after in HALVED)
    side = max(round(math.sqrt(share * height * width)), least)
    return min(side + (least == 3 and side % 2 == 0), height, width)


def _moves(cases: Cases, first: int, count: int, side: int) -> Moves:
    channels, height, width = cases.images.shape[1:]
    drawn = words(restarted(cases.keys, 1), 5 * count, 5 * first).view(-1, count, 5)
    coins = drawn[..., 4]
    row, column = below(drawn[..., 0:2], height - side + 1), below(drawn[..., 2:4], width - side + 1)
    rows, columns = (
        ((place >= begin[..., None]) & (place < begin[..., None] + side)).to(cases.images.dtype)
        for begin, place in ((row, _numbered(height, row)), (column, _numbered(width, row)))
    )
    sign = signs(coins, channels).to(cases.images.dtype)
    return Moves(row[..., 0], column[..., 0], rows, columns, sign, coins >> 63 & 1)


def _stripes(images: Tensor, keys: Tensor, eps: float) -> Tensor:
    channels, _, width = images.shape[1:]
    sign = signs(words(keys, channels * width), 1).view(-1, channels, 1, width)
    return (images + eps * sign).clamp(0, 1)


def _recoloured(best: Tensor, images: Tensor, moves: Moves, side: int, eps: float) -> Tensor:
    return torch.lerp(best, (images + eps * moves.sign[:, :, None, None]).clamp(0, 1), _windows(moves)[:, :1])


def _tiles(images: Tensor, keys: Tensor, eps: float) -> Tensor:
    """Bumps in squares of a fifth of the image's side, each its own way round and of its own sign in each channel."""
    channels, height, width = images.shape[1:]
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    coins = words(keys, rows * columns)
    tile = bumps(side, 0, images.dtype, images.device)[coins >> 63 & 1].unsqueeze(2)  # [B, tiles, 1, side, side]
    tile = (tile * signs(coins, channels)[..., None, None]).view(-1, rows, columns, channels, side, side)
    change = tile.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * side, columns * side)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    change = F.pad(change, (left, width - columns * side - left, top, height - rows * side - top))
    return _at_the_edge(images, change, eps)


def _moved(best: Tensor, images: Tensor, moves: Moves, side: int, eps: float) -> Tensor:
    """Each channel's length within the two windows, and a share of what is left of the ball, into the first.

    There lies the direction of a new bump plus that of the change so far; the second window is emptied.
    """
    change = best - images
    here, there = _windows(moves).split(1, 1)
    either, squares = torch.maximum(here, there), change.square()
    within, freed = _channels(squares * here), _channels(squares * either)
    left = (eps**2 - squares.sum((1, 2, 3), keepdim=True)).clamp_min(0) / images.shape[1]
    new = _placed(images, moves, side) * moves.sign[:, :, None, None]
    new = new + change * here / (within.sqrt() + 1e-12)
    new = new * ((left + freed).sqrt() / (_channels(new.square()).sqrt() + 1e-12))
    return _at_the_edge(images, torch.addcmul(new, change, 1 - either), eps)


def _placed(images: Tensor, moves: Moves, side: int) -> Tensor:
    """The bump of each image in the first window, [B, 1, H, W], 0 elsewhere."""
    zeros = max(images.shape[2:]) - side
    row, column = (
        _numbered(n, begin) + zeros - begin[:, None]
        for n, begin in zip(images.shape[2:], (moves.row, moves.column), strict=True)
    )
    padded = bumps(side, zeros, images.dtype, images.device)
    return padded[moves.turned[:, None, None], row[:, :, None], column[:, None, :]].unsqueeze(1)


@cache
def bumps(side: int, zeros: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bump over a dent, of norm 1, and its transpose: [2, side, side], with so many ``zeros`` on each side."""
    upper, lower = _pyramid(side // 2, side), _pyramid(side - side // 2, side)
    bump = torch.cat((upper, -lower))
    bump = bump / bump.square().sum().sqrt()
    return F.pad(torch.stack((bump, bump.T)), [zeros] * 4).to(device, dtype)


def _pyramid(rows: int, columns: int) -> Tensor:
    """At the distance m from the middle, the larger of rows' and columns', Σ_{k > m} 1 / k²; of norm 1."""
    distance = torch.maximum(
        *torch.meshgrid(
            (torch.arange(rows) - rows // 2).abs(), (torch.arange(columns) - columns // 2).abs(), indexing="ij"
        )
    )
    terms = 1 / torch.arange(1, max(rows, columns) // 2 + 2, dtype=torch.double).square()
    heights = terms.flip(0).cumsum(0).flip(0)[distance]
    return heights / heights.square().sum().sqrt() if rows else heights


def _windows(moves: Moves) -> Tensor:
    """[B, 2, H, W]: 1 in the square, and in the window that L2 empties, else 0; lerp with that selects exactly."""
    return moves.rows[..., None] * moves.columns[..., None, :]


def _numbered(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _at_the_edge(images: Tensor, change: Tensor, eps: float) -> Tensor:
    length = change.square().sum((1, 2, 3), keepdim=True).sqrt()
    return (images + change * (eps / (length + 1e-12))).clamp(0, 1)


def _channels(x: Tensor) -> Tensor:
    return x.sum((2, 3), keepdim=True)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory format of ``like``."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last) if last else x


__all__ = ["blocks", "bumps", "side_of", "square"]
