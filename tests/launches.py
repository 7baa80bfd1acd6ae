"""What the real code would launch on a GPU, and where its host would wait, counted where there is none.

On a GPU the kernels of ``fasttrain_kernels`` are Triton's and everything else is PyTorch's operations. Here
:func:`as_on_a_gpu` makes the same choices for tensors on the host: Triton's launches are noted and not run (what they
would have written is 0), and :class:`Watch` notes every operation that PyTorch would launch and every one for whose
result the host would wait. What cuDNN launches beyond one kernel a convolution is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {
    "aten::alias",
    "aten::detach",
    "aten::is_pinned",
    "aten::promote_types",
    "aten::resize_",
    "aten::_unsafe_view",
}
WAITS = {
    "aten::_local_scalar_dense",
    "aten::_pin_memory",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::lift_fresh",
    "aten::unique_dim",
}
"Operations whose result, or the size of it, the host has to know."
INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Watch(TorchDispatchMode):
    """Counts ``launches`` by name, PyTorch's as ``aten::…``, Triton's by the kernel's own; and ``waits``."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._inside = False

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Whatever is done inside counts as one launch of ``name``."""
        self.launches[name] += 1
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        result = function(*arguments, **(options or {}))
        if self._inside:
            return result
        if name in INDEXES and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1]):
            self.waits[f"{name} by a mask"] += 1
        if name in WAITS:
            self.waits[name] += 1
        if "empty" in name:
            result.zero_()  # what a launch that is not run would have written
        elif name not in NO_LAUNCH and not function.is_view and not _is_empty(result):
            self.launches[name] += 1
        return result

    @property
    def total(self) -> int:
        return self.launches.total()


def _is_empty(result) -> bool:
    return isinstance(result, torch.Tensor) and not result.numel()


@contextmanager
def as_on_a_gpu() -> Iterator[Watch]:
    """Count what is done here, with the choices that the code makes for tensors on a GPU."""
    from triton.runtime.jit import JITFunction

    from fasttrain.models import cudnn, frozen
    from fasttrain_kernels import apgd, batchnorm, convolution, ntxent, relu
    from fasttrain_kernels.apgd.triton import apgd_step_triton
    from fasttrain_kernels.augment import gpu as augment
    from fasttrain_kernels.augment.triton import augment_triton
    from fasttrain_kernels.batchnorm import triton as batchnorm_passes

    watch = Watch()

    def noted(kernel, *arguments, grid, warmup, **options) -> None:
        watch.launches[kernel.fn.__name__] += 1

    def cudnns(x, layer, z):
        with watch.as_one("cudnn_convolution_relu" if z is None else "cudnn_convolution_add_relu"):
            return cudnn.composed(x, layer, z)

    with (
        mock.patch.object(JITFunction, "run", noted),
        mock.patch.object(batchnorm, "_passes", lambda x, impl: batchnorm_passes),
        mock.patch.object(convolution, "_is_cudnns", lambda x: True),
        mock.patch.object(ntxent, "_resolve", lambda *_: "triton"),
        mock.patch.object(apgd, "_implementation", lambda *_: apgd_step_triton),
        mock.patch.object(augment, "_implementation", lambda _: augment_triton),
        mock.patch.object(relu, "_resolve", lambda *_: "triton"),
        mock.patch.object(frozen, "_fuses", lambda dtype: False),
        mock.patch.object(cudnn, "fuses", lambda x: x.dtype != torch.float64),
        mock.patch.object(cudnn, "_trusted", lambda *_: True),
        mock.patch.object(cudnn, "fused", cudnns),
        watch,
    ):
        yield watch
