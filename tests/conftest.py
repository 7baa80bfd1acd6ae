"""Images that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fasttrain import distributed


@pytest.fixture(scope="session", autouse=True)
def one_process_group() -> Iterator[None]:
    """A script that is run within this process leaves its group to the next: DeepSpeed keeps the first for good."""
    with mock.patch("fasttrain.cli.distributed.finalize"):
        yield
    distributed.finalize()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Two classes, 12 training and 6 validation images each, of random blobs."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                small.resize((24, 20), Image.BICUBIC).save(root / split / name / f"{i}.jpg")
    return root
