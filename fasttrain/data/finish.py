"""A decoder's uint8 views -> the batch that is handed over: colours, and the way to the device.

Where the augmentation changes no colours the views stay what they are, uint8, up to the hand-over: a quarter of the
bytes to write, to keep ready and to send to a GPU.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.data.prefetch import Decoded, Produced, Workers
from fasttrain_kernels.augment.cpu import colour_cpu
from fasttrain_kernels.augment.draws import packed
from fasttrain_kernels.augment.gpu import augment_gpu


class FinishOnCpu:
    """Colours by the fused kernel, slices of the batch on several threads."""

    def __init__(self, coloured: bool, device: torch.device, threads: int) -> None:
        self._type = np.float32 if coloured else np.uint8
        self._workers, self._memory, self._move = Workers(threads), Memory(), Mover(device)

    def __call__(self, decoded: Decoded) -> Batch:
        n, size = len(decoded.ids), decoded.views[0].shape[1]
        images = self._memory.take((len(decoded.views), n, size, size, 3), self._type)
        done = []
        for view, pixels in enumerate(decoded.views):
            draws, out = decoded.draws.take((slice(None), view)), images[view].numpy()

            def apply(part: slice, pixels=pixels, draws=draws, out=out) -> None:
                if out.dtype == np.uint8:
                    out[part] = pixels[part]
                else:
                    colour_cpu(pixels[part], draws.take(part), out[part])

            done += self._workers.over_slices(apply, n)
        for part in done:
            part.result()
        return self._move(images, decoded)

    def close(self) -> None:
        self._workers.close()


class FinishOnGpu:
    """Colours by the GPU's kernel on a stream of its own, a view at a time."""

    def __init__(self, coloured: bool, device: torch.device) -> None:
        self._coloured, self._move = coloured, Mover(device)

    def __call__(self, decoded: Decoded) -> Batch:
        with self._move.stream():
            views = [self._move.tensor(torch.as_tensor(pixels)) for pixels in decoded.views]
            if not self._coloured:
                return self._move(torch.stack(views), decoded)
            table = self._move.tensor(torch.from_numpy(packed(decoded.draws)))
            images = torch.empty((len(views), *views[0].shape), device=table.device)
            for view, pixels in enumerate(views):
                augment_gpu(pixels, None, None, table[view : view + 1], images[view : view + 1])
            return self._move(images, decoded)

    def close(self) -> None: ...


class Mover:
    """The way to a device: on a GPU by pinned memory and a stream of its own, for whose end this thread alone waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, decoded: Produced) -> Batch:
        """The batch of ``images`` [V, B, size, size, 3]; after it the decoder's buffers may be used again."""
        labels, ids = torch.tensor(decoded.labels), torch.tensor(decoded.ids)
        with self.stream():
            images, labels, ids = (self.tensor(x) for x in (images, labels, ids))
            if self._stream is not None:
                self._stream.synchronize()
        return Batch(images.permute(0, 1, 4, 2, 3), labels, ids)

    def stream(self) -> torch.cuda.StreamContext:
        """Its stream, for the work within; nothing on a CPU."""
        return torch.cuda.stream(self._stream)

    def tensor(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device; the host does not wait for the copy."""
        if self._stream is not None and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


class Memory:
    """Tensors whose memory is handed out again when no tensor over it lives any more.

    A batch is tens of MB: fresh from the system each time, its pages are mapped and zeroed anew. For 64 images in two
    views of 224 pixels that takes 34 ms of a core; all else takes about 100.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: type[np.number]) -> Tensor:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = self._free.pop() if self._free else np.empty(nbytes, np.uint8)
        if len(array) < nbytes:
            array = np.empty(nbytes, np.uint8)
        lent = array[:nbytes].view(dtype).reshape(shape)
        weakref.finalize(lent, self._free.append, array).atexit = False  # torch keeps `lent` as long as it needs it
        return torch.from_numpy(lent)


__all__ = ["FinishOnCpu", "FinishOnGpu", "Memory", "Mover"]
