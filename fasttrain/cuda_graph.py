"""A micro-batch's forward and backward pass as CUDA graphs: recorded once, then each launched by one call.

A ResNet-18's step is hundreds of launches, a penalty's or an attack's over a thousand, at some microseconds of the
host's each: on 32 pixels the GPU is done before the host is. A graph replays them without the host. What is recorded
reads and writes fixed memory and takes no decision, so that::

    forward     the batch is copied to where the recorded passes read it;  replay;  the loss is copied from there
    verdict     as without: the loss and what ranks agree on travel to the host between the two replays
    backward    the loss's factor (1/accumulation, the loss scale, NaN where it is to be spoiled) is written;  replay;
                gradients are the recorded ones, or their sum over micro-batches

Weights, buffers (BatchNorm's statistics, an adversary's count of its calls), optimiser and gate are what they are
without. The first :data:`WARM_UP` micro-batches of a kind run as usual, since kernels are compiled and algorithms tried
then; a recording is then compared with the same passes run as usual, and used only if they agree.

Where that cannot be (ZeRO's hooks, gradients that are cached, values that ranks exchange on the way), an attack that is
part of a view is recorded by itself, which is most of such a step.

A recording is valid for one kind of batch (shapes), of modules in one mode, whose tensors lie where they lay; another
kind gets one of its own, up to :data:`MOST`. A resumed run records again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.checkpoint.state import random_state, set_random_state
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoder
from fasttrain.precision import autocast_dtype
from fasttrain.views.adversarial import Adversarial

T = TypeVar("T")
CudaGraph = Literal["auto", "on", "off"]
Forward = tuple[Tensor, dict[str, Tensor]]
"The loss, and what to log."

WARM_UP = 3
"Micro-batches of a kind that run as usual before one is recorded."
MOST = 3
"Recordings, each of which keeps the memory of its activations."
TOLERANCE = 0.05
"Of the relative difference between replayed and usual gradients: looked for is a broken recording, not rounding."


class Passes(Protocol):
    """How a micro-batch is taken forward and back."""

    def forward(self, batch: Batch) -> Forward: ...

    def backward(self, loss: Tensor, factor: Tensor | None = None) -> None:
        """Gradients of ``factor`` (1 where there is none) times the loss that the last ``forward`` returned."""
        ...


class Usual:
    """DeepSpeed's, operation by operation."""

    def __init__(self, engine) -> None:
        self._engine = engine

    def forward(self, batch: Batch) -> Forward:
        return self._engine(batch)

    def backward(self, loss: Tensor, factor: Tensor | None = None) -> None:
        self._engine.backward(loss if factor is None else loss * factor)


class Recorder:
    """Records work on the GPU: nothing is done, but memory is given to what it will produce."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What ``work`` returns, of which each call of the second value makes the tensors anew, in place."""
        graph = torch.cuda.CUDAGraph()
        # the loader's thread goes on allocating and copying meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return result, graph.replay


def make_passes(engine, config: Any, say: Callable[[str], None]) -> Passes:
    """What ``train.cuda_graph`` asks for.

    Args:
        config: a :class:`~fasttrain.engine.TrainConfig`.

    Raises:
        UsageError: ``on``, and a part cannot be recorded; the reason.
    """
    usual, device = Usual(engine), next(engine.module.parameters()).device
    reason = why_not(engine.module, config, device)
    if config.cuda_graph == "off" or (config.cuda_graph == "auto" and device.type != "cuda"):
        return usual
    if reason is None:
        return Recorded(usual, engine, config, Recorder(), say)
    if config.cuda_graph == "on":
        raise UsageError(f"train.cuda_graph=on: {reason}; use auto", everywhere=True)
    say(f"no CUDA graphs of whole passes: {reason}")
    record_attacks(engine.module, Recorder, say)
    return usual


def record_attacks(module: nn.Module, recorder: Callable[[], Recorder], say: Callable[[str], None]) -> None:
    """Let the views of ``module`` that attack do so by recordings."""
    for view in module.modules():
        if isinstance(view, Adversarial):
            view.moved = RecordedAttack(view, recorder(), say)


def why_not(module: nn.Module, config: Any, device: torch.device) -> str | None:
    """Why the passes of ``module`` cannot be recorded, as far as that is known before they run."""
    if device.type != "cuda":
        return "there is no GPU"
    if config.zero_stage:
        return f"train.zero_stage={config.zero_stage} reduces gradients from hooks that the host runs"
    if config.loss_over == "batch" and config.accumulation > 1:
        return "train.loss_over=batch encodes each micro-batch again, from random states that the host sets"
    if any(getattr(part, "checkpoint_activations", False) for part in module.modules()):
        return "model.checkpoint_activations=true encodes again, from random states that the host sets"
    return None


class _Shelf:
    """Recordings by kind of batch, of which one is made after :data:`WARM_UP` batches."""

    def __init__(self, modules: list[nn.Module], make: Callable[[Batch], Any], refuse: Callable[[str], None]) -> None:
        self._modules, self._make, self._refuse = modules, make, refuse
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, Any] = {}
        self._closed = False

    def find(self, batch: Batch, may_make: bool = True) -> Any:
        """The recording for ``batch``, or ``None`` where there is none yet, or will be none."""
        if self._closed:
            return None
        kind = self._kind(batch)
        if kind in self._recordings:
            return self._recordings[kind]
        self._seen[kind] += 1
        if self._seen[kind] <= WARM_UP or not may_make:
            return None
        if len(self._recordings) == MOST:
            return self.close(f"batches are of more than {MOST} kinds")
        try:
            self._recordings[kind] = self._make(batch)
        except RuntimeError as error:  # whatever a part does that cannot be recorded; out of memory
            return self.close(" ".join(str(error).split())[:300])
        return self._recordings[kind]

    def usual(self, work: Callable[[], T]) -> T:
        """Do ``work`` without a recording, and make none of what exchanges values between ranks."""
        before = distributed.exchanges()
        result = work()
        if not self._closed and distributed.exchanges() > before:
            self.close("BatchNorm or a loss exchanges values between ranks on the way")
        return result

    def close(self, reason: str) -> None:
        self._closed = True
        self._recordings.clear()
        self._refuse(reason)

    def _kind(self, batch: Batch) -> tuple:
        """What a recording is valid for."""
        tensors = [t for module in self._modules for t in (*module.parameters(), *module.buffers())]
        return (
            tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in batch),
            tuple(part.training for module in self._modules for part in module.modules()),
            tuple(t.data_ptr() for t in tensors),
        )


class Recorded:
    """Passes that are recorded and replayed where that is possible, and as usual elsewhere."""

    def __init__(self, usual: Usual, engine, config: Any, recorder: Recorder, say: Callable[[str], None]) -> None:
        self._usual, self._engine, self._config, self._recorder, self._say = usual, engine, config, recorder, say
        self._module = engine.module
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._shelf = _Shelf([self._module], self._record, self._refuse)
        self._current: _Recording | None = None
        self._sums: list[Tensor] | None = None

    def forward(self, batch: Batch) -> Forward:
        recording = self._shelf.find(batch, may_make=self._first)
        if self._current is None and not self._first:
            recording = None  # a step is taken in one way
        self._current = recording
        if recording is None:
            return self._shelf.usual(lambda: self._usual.forward(batch))
        recording.put(batch)
        recording.forward()
        return recording.loss.detach().clone(), recording.terms

    def backward(self, loss: Tensor, factor: Tensor | None = None) -> None:
        recording, engine = self._current, self._engine
        if recording is None:
            self._usual.backward(loss, factor)
            return
        self._scale(recording.factor, factor)
        recording.backward()
        gradients = recording.gradients
        if self._config.accumulation > 1:
            present = [g for g in gradients if g is not None]
            self._sums = self._sums or [torch.empty_like(g) for g in present]
            (torch._foreach_copy_ if self._first else torch._foreach_add_)(self._sums, present)
            sums = iter(self._sums)
            gradients = [None if g is None else next(sums) for g in gradients]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        if engine.enable_backward_allreduce:
            engine.allreduce_gradients()

    @property
    def _first(self) -> bool:
        """Whether the micro-batch is the first of its optimiser step."""
        return self._engine.micro_steps % self._config.accumulation == 0

    def _record(self, batch: Batch) -> _Recording:
        """Of this batch's passes; nothing that training sees has changed afterwards.

        Raises:
            RuntimeError: it cannot be recorded, or what is replayed is not what the passes do.
        """
        recording = _Recording(self._module, self._parameters, batch, self._run)
        restore = _restorer(self._module)
        try:
            self._scale(recording.factor, None)
            recording.work_forward()
            usual = [g if g is None else g.clone() for g in recording.work_backward()]
            loss = recording.loss.detach().clone()
            restore()
            recording.record(self._recorder)
            restore()
            recording.forward()
            recording.backward()
            _compare("gradients", [loss, *usual], [recording.loss.detach(), *recording.gradients])
        finally:
            restore()
            for parameter in self._parameters:
                parameter.grad = None
        return recording

    def _run(self, batch: Batch) -> Forward:
        dtype = autocast_dtype(self._config.precision)
        with torch.autocast(batch.images.device.type, dtype, enabled=dtype is not None):
            return self._module(batch)

    def _scale(self, into: Tensor, factor: Tensor | None) -> None:
        """Write what the loss is multiplied by before it is differentiated, as ``engine.backward`` does it."""
        whole = torch.ones_like(into) if factor is None else factor.to(into.dtype)
        whole = whole / self._config.accumulation
        scaler = self._engine.torch_autocast_z0_gradscaler
        into.copy_(whole if scaler is None else scaler.scale(whole))

    def _refuse(self, reason: str) -> None:
        if self._config.cuda_graph == "on":
            raise UsageError(f"train.cuda_graph=on: {reason}; use auto")
        self._say(f"no CUDA graphs of whole passes: {reason}")
        record_attacks(self._module, type(self._recorder), self._say)


class RecordedAttack:
    """What :meth:`~fasttrain.views.adversarial.Adversarial.moved` gives, by recordings."""

    def __init__(self, view: Adversarial, recorder: Recorder, say: Callable[[str], None]) -> None:
        self._view, self._usual, self._recorder = view, view.moved, recorder
        self._shelf: _Shelf | None = None
        self._say = say

    def __call__(self, encoder: Encoder, batch: Batch) -> Tensor:
        if self._shelf is None:
            refuse = lambda reason: self._say(f"no CUDA graph of the attack: {reason}")  # noqa: E731
            self._shelf = _Shelf([self._view, encoder], lambda batch: self._record(encoder, batch), refuse)
        found = self._shelf.find(batch)
        if found is None:
            return self._shelf.usual(lambda: self._usual(encoder, batch))
        inputs, images, replay = found
        _put(inputs, batch)
        replay()
        return images.clone()

    def _record(self, encoder: Encoder, batch: Batch) -> tuple[Batch, Tensor, Callable[[], None]]:
        inputs, kind = _copy(batch), batch.images.device.type
        restore = _restorer(self._view, encoder)
        half = torch.get_autocast_dtype(kind)

        def work() -> Tensor:
            # casts of weights that are kept would be read outside of the recording, before it has run
            with torch.autocast(kind, half, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
                return self._usual(encoder, inputs)

        try:
            usual = work()
            restore()
            images, replay = self._recorder.record(work)
            restore()
            replay()
            _compare("images", [usual], [images])
        finally:
            restore()
        return inputs, images, replay


class _Recording:
    """One kind of batch's passes, and the memory that they read and write."""

    loss: Tensor
    terms: dict[str, Tensor]
    gradients: list[Tensor | None]
    forward: Callable[[], None]
    backward: Callable[[], None]

    def __init__(
        self, module: nn.Module, parameters: list[nn.Parameter], batch: Batch, run: Callable[[Batch], Forward]
    ) -> None:
        self._parameters, self._run = parameters, run
        self._batch = _copy(batch)
        self.factor = torch.ones((), device=batch.images.device)

    def put(self, batch: Batch) -> None:
        _put(self._batch, batch)

    def record(self, recorder: Recorder) -> None:
        (self.loss, self.terms), self.forward = recorder.record(self.work_forward)
        self.gradients, self.backward = recorder.record(self.work_backward)

    def work_forward(self) -> Forward:
        self._last = self._run(self._batch)
        self.loss = self._last[0]
        return self._last

    def work_backward(self) -> list[Tensor | None]:
        for parameter in self._parameters:
            parameter.grad = None
        torch.autograd.backward(self._last[0], self.factor)
        return [parameter.grad for parameter in self._parameters]


def _copy(batch: Batch) -> Batch:
    return Batch(*(t if t is None else t.clone() for t in batch))


def _put(into: Batch, batch: Batch) -> None:
    for ours, theirs in zip(into, batch, strict=True):
        if ours is not None:
            ours.copy_(theirs, non_blocking=True)


def _restorer(*modules: nn.Module) -> Callable[[], None]:
    """Puts buffers and random state back to what they are now."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    kept, random = [buffer.clone() for buffer in buffers], random_state()

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        set_random_state(random)

    return restore


def _compare(what: str, usual: list[Tensor | None], replayed: list[Tensor | None]) -> None:
    """Raise RuntimeError where ‖replayed − usual‖ / ‖usual‖ is too large."""
    pairs = [(a, b) for a, b in zip(usual, replayed, strict=True) if a is not None or b is not None]
    alike = all(a is not None and b is not None for a, b in pairs)
    off = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum() if alike else torch.inf
    size = torch.stack([a.double().square().sum() for a, _ in pairs]).sum() if alike else 1.0
    difference = float(off / size) ** 0.5
    if not difference < TOLERANCE:
        raise RuntimeError(f"replayed {what} are {difference:.1e} from those of the passes themselves")


__all__ = ["CudaGraph", "Passes", "Recorded", "RecordedAttack", "Recorder", "Usual", "make_passes", "record_attacks"]
