"""Sizes of blocks on a GPU; chosen by compiling for sm_80, sm_89 and sm_90, not yet by measuring."""

from __future__ import annotations

from fasttrain_kernels.ntxent.log_sum_exp import Precision

MULTIPROCESSORS = 132
"Of an H100 or H200: as many programs there should be, even if each then holds fewer rows than it could."


def block_of_rows(rows: int, precision: Precision, second: bool = False) -> int:
    """The most rows a program, as long as there are enough programs for a GPU; a tensor core takes 16 at least."""
    size = 128 if precision == "bf16" and not second else 64
    while size > 16 and rows < size * MULTIPROCESSORS:
        size //= 2
    return size


def blocks(rows: int, dimensions: int, precision: Precision, second: bool = False) -> dict[str, int]:
    """What a kernel is compiled for; ``second``: those of the second derivative."""
    padded = max(16, 1 << (dimensions - 1).bit_length())
    large = precision == "bf16" and not second
    return {
        "ROWS": block_of_rows(rows, precision, second),
        "COLUMNS": 64 if large else 32,
        "DEPTH": min(padded, 128 if precision == "bf16" else 64),
        "WIDTH": min(padded, 128),
        "DIMENSIONS": padded,
        "num_warps": 8 if large else 4,
        "num_stages": 2,
    }
