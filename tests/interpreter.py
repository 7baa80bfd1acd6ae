"""Whether Triton's interpreter works here."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

import pytest


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", metadata.version(package))[:2]))


def _broken() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return _version("triton") < (3, 7) and _version("numpy") >= (2, 4)


needs_interpreter = pytest.mark.skipif(
    _broken(),
    reason="the interpreter of Triton before 3.7 takes arrays of one value for numbers, which NumPy 2.4 ended",
)
