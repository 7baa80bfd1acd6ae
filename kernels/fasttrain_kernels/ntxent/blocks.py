"""Sizes of blocks on a GPU: chosen by compiling for sm_80, sm_89 and sm_90, not yet by measuring.

For d = 128 registers suffice on sm_90 but for a few: at most 40 bytes a thread are kept in memory instead, and on sm_80
and sm_89 at most 152.
"""

from __future__ import annotations

from typing import NamedTuple

from fasttrain_kernels.ntxent.log_sum_exp import Precision

FORWARD_REGISTERS = 128
"""A thread, at most: then two programs of 256 threads share a multiprocessor, and one can multiply as the other takes
exponentials."""
MULTIPROCESSORS = 132
"Of an H100 or H200: as many programs there should be, even if each then holds fewer rows than it could."


class _Sizes(NamedTuple):
    rows: int  # that a program holds
    columns: int  # that stream past, at a time
    depth: int  # of a product, at a time
    stages: int  # of loads that are under way


FIRST: dict[Precision, _Sizes] = {
    "bf16": _Sizes(128, 64, 128, 3),
    "tf32": _Sizes(64, 32, 64, 2),
    "fp32": _Sizes(64, 32, 64, 2),
}
"The loss and its derivative, whose kernels multiply two and three pairs of tiles."
SECOND: dict[Precision, _Sizes] = {
    "bf16": _Sizes(64, 32, 128, 2),
    "tf32": _Sizes(64, 32, 64, 2),
    "fp32": _Sizes(64, 16, 32, 2),
}
"The second derivative, whose kernels multiply three and five."


def block_of_rows(rows: int, precision: Precision, second: bool = False) -> int:
    """The most rows a program, as long as there are enough programs for a GPU; a tensor core takes 16 at least."""
    size = (SECOND if second else FIRST)[precision].rows
    while size > 16 and rows < size * MULTIPROCESSORS:
        size //= 2
    return size


def blocks(rows: int, dimensions: int, precision: Precision, second: bool = False) -> dict[str, int]:
    """What a kernel is compiled for; ``second``: those of the second derivative."""
    padded = max(16, 1 << (dimensions - 1).bit_length())
    sizes, size = (SECOND if second else FIRST)[precision], block_of_rows(rows, precision, second)
    return {
        "ROWS": size,
        "COLUMNS": sizes.columns,
        "DEPTH": min(padded, sizes.depth),
        "WIDTH": min(padded, 128),
        "DIMENSIONS": padded,
        "num_warps": 4 if size < 64 or (precision == "bf16" and second) else 8,
        "num_stages": sizes.stages,
    }
