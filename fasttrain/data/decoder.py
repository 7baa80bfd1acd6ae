"""DALI's image decoder by itself: what launch/prepare.py verifies with, and the FFCV writer takes pixels from.

The loader's pipelines decode by the same operator and :data:`DECODING`, on the CPU or (``mixed``) the GPU. On a GPU
JPEGs go to nvJPEG, and other formats perhaps to other libraries, which may refuse what the CPU's decoder takes: in such
a run that is a bad image (``damage.py``). What is promised is the CPU's word: an image that it takes, a CPU run shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from nvidia.dali import __version__ as VERSION
from nvidia.dali import fn, pipeline_def, types

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

DECODING = dict(output_type=types.RGB, adjust_orientation=False)  # as stored: see header.py


class Decoder:
    """Decodes a few files at a time on the calling thread's core; one that fails does not take others with it."""

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch
        self._pipeline: Pipeline | None = None  # none yet, or DALI refuses all further work of the last

    def decode(self, contents: list[np.ndarray]) -> list[np.ndarray | str]:
        """Files' bytes, ``batch`` at most -> uint8 [H, W, 3] each, or why DALI refuses it."""
        try:
            return self._run(contents)
        except RuntimeError as error:
            self._pipeline = None
            if len(contents) == 1:
                return [_cause(error)]
        return [result for content in contents for result in self.decode([content])]

    def _run(self, contents: list[np.ndarray]) -> list[np.ndarray]:
        if self._pipeline is None:
            self._pipeline = _build(self._batch)
        self._pipeline.feed_input("content", contents)
        self._pipeline.schedule_run()
        (images,) = self._pipeline.share_outputs()
        self._pipeline.release_outputs()
        return [np.asarray(images[n]) for n in range(len(images))]  # DALI's memory, theirs as long as they live


def _build(batch: int) -> Pipeline:
    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    def define() -> DataNode:
        return fn.decoders.image(fn.external_source(name="content", dtype=types.UINT8, ndim=1), **DECODING)

    pipeline = define()
    pipeline.build()
    return pipeline


def _cause(error: RuntimeError) -> str:
    """The line of DALI's message that tells: what stands between where it happened and what follows from it."""
    told = str(error).partition("encountered:")[2].partition("Current pipeline object")[0]
    return " ".join(told.split()).rstrip(" :") or "no reason given"


__all__ = ["DECODING", "VERSION", "Decoder"]
