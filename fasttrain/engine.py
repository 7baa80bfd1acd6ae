"""deepspeed.initialize and train(): one visible loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import Tensor, nn

from fasttrain import checkpoint, distributed, gradient_cache
from fasttrain.config import Config, PathText, Where
from fasttrain.cuda_graph import CudaGraph, Passes, make_passes
from fasttrain.data import Batch
from fasttrain.data.loader import Loader
from fasttrain.data.order import Order
from fasttrain.errors import NotFinite, UsageError
from fasttrain.nonfinite import Gate, Guard, Taken, unusable
from fasttrain.optim import OptimizerConfig, build_optimizer, schedule
from fasttrain.precision import LossScale, Precision, autocast_dtype, decide
from fasttrain.run import Run, read_metrics
from fasttrain.stop import Stopped, StopRequest

OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.batch and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip",
    "torch_autocast": "train.precision",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.lr, optimizer.schedule and optimizer.warmup_epochs (or warmup_steps)",
    "zero_allow_untested_optimizer": "train.zero_stage",
    "steps_per_print": "run.log_every",
    "timers": "nothing, since they make the host wait for the GPU in every step;",
}
"DeepSpeed's keys that have an owner in our configuration, and which."
BESIDE_TERMS = ("view/", "penalty/")
"What a step logs besides its terms' values, under full names."


class TrainConfig(Config):
    """How long, in what batches, at what precision."""

    epochs: int = Field(100, ge=1)
    "passes over the data"
    steps: int | None = Field(None, ge=1)
    "train for so many steps instead of whole epochs"
    batch: int = Field(256, ge=1)
    "images an optimiser step: all ranks and accumulation steps together"
    accumulation: int = Field(1, ge=1)
    "micro-batches an optimiser step"
    loss_over: Literal["micro_batch", "batch"] = "micro_batch"
    """With accumulation, what a contrastive loss compares: the images of a micro-batch (of all ranks), or of the whole
    batch, exactly, for one more forward pass (gradient caching; needs model.sync_bn=false)."""
    precision: Precision = "auto"
    """autocast of convolutions and products (fp16: with loss scaling; auto: bf16 where the hardware has it, else fp32);
    tf32: a GPU's float32 with factors of 11 bits, which fp32 never is here"""
    device: distributed.Device = "auto"
    "auto: the GPU when there is one"
    deterministic: bool = False
    "on a GPU, only algorithms that give the same bits each time, which are slower; on a CPU all are such"
    cuda_graph: CudaGraph = "auto"
    """on a GPU, record a micro-batch's forward and backward pass and launch each as one: auto (where it can be; a line
    says why not), on (or stop) or off"""
    zero_stage: int = 0
    "DeepSpeed ZeRO: 0, 1 (optimiser state sharded) or 2 (and gradients); 0 is the fastest with LARS"
    clip: float = Field(0.0, ge=0)
    "largest global gradient norm; 0: no clipping"
    on_non_finite: Literal["stop", "skip"] = "stop"
    "when the loss or the gradient of a step is not finite: stop, or undo the step and take the next"
    max_skipped: int = Field(10, ge=0)
    "steps of the run that may be skipped; at one more it stops"
    deepspeed: PathText | None = None
    "JSON file of further DeepSpeed settings; a key that this configuration owns is refused"

    reads: ClassVar[dict[str, Where]] = {
        "epochs": Where("steps", (None,)),
        "max_skipped": Where("on_non_finite", ("skip",)),
    }

    @field_validator("zero_stage")
    @classmethod
    def _stages(cls, stage: int) -> int:
        if stage == 3:
            raise ValueError(
                "zero_stage=3 is refused: double backward through its partitioned weights fails "
                '("expected stride to be a single integer"); use 0, 1 or 2'
            )
        if stage not in (0, 1, 2):
            raise ValueError(f"zero_stage={stage} does not exist; use 0, 1 or 2")
        return stage

    def on(self, device: torch.device) -> TrainConfig:
        """These settings with ``precision=auto`` decided for ``device``."""
        return self.model_copy(update={"precision": decide(self.precision, device)})

    def micro_batch(self, world: int) -> int:
        """Images of one rank's micro-batch."""
        share, rest = divmod(self.batch, world * self.accumulation)
        if rest or not share:
            raise UsageError(
                f"train.batch={self.batch} does not divide by {world} ranks x train.accumulation={self.accumulation}: "
                f"make it a multiple of {world * self.accumulation}"
            )
        return share


def deepspeed_settings(config: TrainConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours; every number has one owner.

    ``gradient_clipping`` is always written, since DeepSpeed clips at 1.0 when it is absent; at stage 0
    :class:`~fasttrain.nonfinite.Gate` clips, which waits for nothing. No module is listed as safe in low precision, so
    that gradients are reduced in fp32. DeepSpeed's throughput timer would wait for the whole GPU twice a micro-batch.
    """
    extra: dict[str, Any] = {}
    if config.deepspeed is not None:
        try:
            extra = json.loads(Path(config.deepspeed).read_text())
            if not isinstance(extra, dict) or not isinstance(extra.get("zero_optimization", {}), dict):
                raise ValueError("DeepSpeed's settings are an object, and so is its zero_optimization")
        except (OSError, ValueError) as error:
            raise UsageError(f"train.deepspeed={config.deepspeed} cannot be read as JSON: {error}") from None
        for key in sorted(extra.keys() & OWNED.keys()):
            raise UsageError(
                f"train.deepspeed={config.deepspeed} sets '{key}', which {OWNED[key]} owns: remove it there"
            )
        if "stage" in extra.get("zero_optimization", {}):
            raise UsageError(
                f"train.deepspeed={config.deepspeed} sets 'zero_optimization.stage', which train.zero_stage owns: "
                "remove it there"
            )
    dtype = autocast_dtype(config.precision)
    return {
        **extra,
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": config.micro_batch(world),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip if config.zero_stage else 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**extra.get("zero_optimization", {}), "stage": config.zero_stage},
        "torch_autocast": {
            "enabled": dtype is not None,
            "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
    }


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig):
    """Wrap ``module`` (a :class:`~fasttrain.step.TrainStep`) in a DeepSpeed engine; rank 0's weights reach all ranks.

    Weights become channels-last at stage 0, after DeepSpeed's broadcast, which refuses them so. ZeRO 1 and 2 keep them
    in flat buffers; there only the activations are channels-last.
    """
    import deepspeed

    if config.loss_over == "batch" and config.accumulation > 1:
        gradient_cache.check_batchnorm(module)
    trainable = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=trainable,
        optimizer=optimizer,
        config=deepspeed_settings(config, distributed.world_size()),
        dist_init_required=False,
    )
    if config.zero_stage == 0:
        engine.module.to(memory_format=torch.channels_last)
        if distributed.world_size() == 1:  # else DeepSpeed flattens, "reduces" and copies back every gradient
            engine.enable_backward_allreduce = False
    return engine


class Callback(NamedTuple):
    """``function(step) -> values to report``, called after every ``every``-th step and after the last."""

    every: int
    function: Callable[[int], dict[str, float]]
    metrics: tuple[str, ...] = ()  # what is NaN where the function raises NotFinite


class Plan(NamedTuple):
    """How many optimiser steps a run takes, and the learning rate of each."""

    steps: int
    steps_per_epoch: int
    learning_rate: Callable[[int], float]


def plan(train: TrainConfig, optimizer: OptimizerConfig, order: Order) -> Plan:
    """The plan that follows from the settings and the number of images.

    Raises:
        UsageError: the warm-up is not shorter than the run, or a milestone of the learning rate is not within it.
    """
    steps_per_epoch = len(order) // train.accumulation
    steps = train.steps or train.epochs * steps_per_epoch
    peak, warmup, cycle = (
        optimizer.peak(train.batch),
        optimizer.warmup(steps_per_epoch),
        optimizer.cycle(steps_per_epoch),
    )
    falls = optimizer.falls(steps_per_epoch, steps)
    learning_rate = schedule(peak, warmup, steps, optimizer.schedule, cycle, optimizer.cycle_growth, falls)
    return Plan(steps, steps_per_epoch, learning_rate)


def fit(
    module: nn.Module,
    config: Any,
    plan: Plan,
    loader: Loader,
    data: str,
    run: Run,
    device: torch.device,
    evaluations: Sequence[Callback] = (),
) -> bool:
    """What every training script does: wrap, resume from the newest whole checkpoint, train, save.

    Args:
        module: a :class:`~fasttrain.step.TrainStep` on ``device``.
        config: the run's whole configuration, with the sections ``train`` and ``optimizer``; saved with the run.
        data: fingerprint of the training images, which a resumed run must see again.
        evaluations: run before the first step too.

    Returns:
        True when the last step was done; False when a signal ended the run early.

    Raises:
        UsageError: the ranks see different images, and what :func:`train` raises.
    """
    if len(set(distributed.all_gather_object(data))) > 1:
        raise UsageError(
            "the ranks do not see the same images: give every machine the same data.root and manifest "
            "(launch/doctor.py says which differ)",
            everywhere=True,
        )
    optimizer = build_optimizer(config.optimizer, module, config.train.zero_stage, device)
    engine = initialize(module, optimizer, config.train)
    loss_scale = LossScale(engine) if config.train.precision == "fp16" else None
    start = checkpoint.resume(run, engine, config, data, plan.steps, loss_scale)
    run.open(config, start.step, plan.steps)
    guard = Guard(run, engine, config, data, start.skipped)

    def facts() -> dict[str, Any]:
        scale = {"loss_scale": loss_scale.state()} if loss_scale is not None else {}
        return {"config": config.model_dump(mode="json"), "data": data, "skipped": guard.skipped} | scale

    saver = checkpoint.Saver(run, engine, facts)
    if start.step == 0:
        evaluate_untrained(run, evaluations)
    finished = train(engine, loader, config.train, plan, start.step, run, saver, guard, evaluations, loss_scale)
    loader.close()
    if not finished:
        run.say(f"stopped by a signal; saved in {run.checkpoints}: the same command goes on from there")
    elif distributed.rank() == 0:
        if found := unusable(engine.module.state_dict()):
            run.say(f"WARNING: the model has diverged: {found}")
        if checkpoint.lacks_best(run.checkpoints, run.config):
            metric = run.config.best_metric
            run.say(f"WARNING: run.keep_best: at no checkpoint was {metric} finite, so none is kept as the best")
    return finished


def evaluate(run: Run, evaluations: Sequence[Callback], step: int) -> dict[str, float]:
    """Make the evaluations of ``step`` and report them in one line; what cannot be measured is NaN, and why is said."""
    found: dict[str, float] = {}
    for evaluation in evaluations:
        try:
            found |= evaluation.function(step)
        except NotFinite as failure:
            run.say(f"WARNING: {', '.join(evaluation.metrics)} of step {step} cannot be measured: {failure}")
            found |= dict.fromkeys(evaluation.metrics, math.nan)
    if found:
        run.report(step, found)
    return found


def evaluate_untrained(run: Run, evaluations: Sequence[Callback]) -> None:
    """Report every evaluation before the first step.

    Raises:
        UsageError: none of them gives the metric that ``run.keep_best`` names.
    """
    found = evaluate(run, evaluations, 0)
    if run.config.keep_best is not None and run.config.best_metric not in found:
        raise UsageError(
            f"run.keep_best={run.config.keep_best}: no evaluation reports it; "
            + (f"they report {', '.join(found)}" if found else "there is none, see --help for how to set one"),
            everywhere=True,
        )


def evaluate_saved(
    run: Run, saver: checkpoint.Saver, evaluations: Sequence[Callback], step: int, found: dict[str, float] | None = None
) -> bool:
    """Evaluate at a step whose checkpoint is being written, and mark it with what was found.

    Args:
        found: what the evaluations gave, where an earlier life of the run made them.

    Returns:
        False when a signal cut them short; then nothing is reported, and the resumed run makes them.
    """
    try:
        found = found or evaluate(run, evaluations, step)
    except Stopped:
        return False
    saver.mark(step, found)
    return True


def reported(run: Run, step: int) -> dict[str, float] | None:
    """What the run's metrics say that the evaluations of ``step`` gave; training reports have a learning rate."""

    def find() -> dict[str, float] | None:
        lines = (line for line in read_metrics(run.dir / "metrics.jsonl") if line.pop("step") == step)
        return next((line for line in lines if "lr" not in line), None)

    return distributed.on_rank_zero(find)


def train(
    engine,
    loader: Loader,
    config: TrainConfig,
    plan: Plan,
    start: int,
    run: Run,
    saver: checkpoint.Saver,
    guard: Guard,
    evaluations: Sequence[Callback] = (),
    loss_scale: LossScale | None = None,
) -> bool:
    """Take the steps from ``start`` on; True when all is done, False when a signal ended it early (it is saved).

    A checkpoint is made before each evaluation, so that a signal, or a kill, during a long one costs no step.

    Raises:
        UsageError: a loss or gradient is not finite, or a checkpoint cannot be written, and the policy is to stop; more
            images are bad than ``loader.bad_share`` allows; on all ranks together.
    """
    meter = Meter(config.batch)
    gate = Gate(engine, config.clip, scaled=config.precision == "fp16")
    passes = make_passes(engine, config, run.say)
    batches = loader.iterate(start * config.accumulation)
    engine.train()

    def due(done: int) -> list[Callback]:
        return [evaluation for evaluation in evaluations if done % evaluation.every == 0 or done == plan.steps]

    with StopRequest() as stop:
        if start and due(start):
            with meter.paused():
                if not evaluate_saved(run, saver, due(start), start, reported(run, start)):
                    return False
        step, before = start, None
        while step < plan.steps:
            done, last = step + 1, step + 1 == plan.steps
            for group in engine.optimizer.param_groups:
                group["lr"] = plan.learning_rate(step) * group.get("lr_factor", 1.0)

            guard.begin(step)
            taken = Taken(step, [], [])
            for micro, forward in enumerate(forwards(engine, passes, batches, config, meter)):
                taken.seen.append(forward.index)
                taken.losses.append(forward.value)
                factor = None
                if micro + 1 == config.accumulation:
                    verdict = Verdict(taken.losses, stop.received, saver.failed, gate.shut)
                    factor = verdict.factor
                passes.backward(forward.loss, factor)
                gate.step()
            if loss_scale is not None:
                loss_scale.update()
            if verdict.shut:  # since the step before, of which nothing has moved; nor has anything of this one
                guard.reject(before, f"the gradient of step {before.step} is not finite")
                gate.open()
                batches = loader.iterate(step * config.accumulation)
                continue
            reports, saves = (done % every == 0 or last for every in (run.config.log_every, run.config.save_every))
            settles = reports or saves or due(done) or verdict.stop or verdict.save_failed or not gate.defers
            rejected = not verdict.finite or (settles and gate.is_shut())
            if rejected:
                what, value = ("gradient", "not finite") if verdict.finite else ("loss", verdict.loss)
                guard.reject(taken, f"the {what} of step {step} is {value}")
                gate.open()
            meter.steps += 1
            before, step = taken, done

            run.progress(done)
            if reports:
                values = {"epoch": round(done / plan.steps_per_epoch, 3)}
                values |= {"loss": verdict.loss} if not rejected else {}
                if len(forward.terms) > 1 and not rejected:
                    means = distributed.mean(forward.terms)
                    values |= {n if n.startswith(BESIDE_TERMS) else f"loss/{n}": value for n, value in means.items()}
                values |= {"loss_scale": loss_scale.scale} if loss_scale is not None else {}
                values |= {"skipped_steps": guard.skipped} if guard.skipped else {}
                values |= {"bad_images": run.list_bad_images(loader.bad)} if loader.bad.agree() else {}
                run.report(done, values | {"lr": plan.learning_rate(step)} | meter.read() | saver.timings())
            if verdict.save_failed:
                saver.stop_if_failed()
            stopping, evaluating = verdict.stop, due(done)
            stop.agree(stopping)
            if saves or stopping or evaluating:
                with meter.paused():
                    saver.save(done)
            if evaluating and not stopping:  # else it is for the resumed run to do
                with meter.paused():
                    stopping = not evaluate_saved(run, saver, evaluating, done)
            if stopping or last:
                saver.finish()
                return last and not (stopping and evaluating)
    return True


def forwards(
    engine, passes: Passes, batches: Iterator[Batch], config: TrainConfig, meter: Meter
) -> Iterator[gradient_cache.Forward]:
    """Take the micro-batches of one optimiser step to where each is to be backpropagated."""

    def fetched() -> Batch:
        with meter.waiting():
            return next(batches)

    if config.loss_over == "batch" and config.accumulation > 1:
        whole = [fetched() for _ in range(config.accumulation)]
        yield from gradient_cache.forwards(engine, whole, autocast_dtype(config.precision))
        return
    for _ in range(config.accumulation):
        batch = fetched()
        loss, terms = passes.forward(batch)
        yield gradient_cache.Forward(batch.index, loss, loss.detach(), terms)


class Verdict:
    """What all ranks agree on about a step: its mean loss, whether it is finite, whether anyone was told to stop or
    failed to write a checkpoint, and whether the gate was shut by an earlier step's gradient.

    The values travel to the host on their own, recorded before the backward pass is launched, so that reading them
    waits for the forward pass alone.
    """

    def __init__(self, losses: list[Tensor], stop: bool, save_failed: bool, shut: Tensor) -> None:
        total = torch.stack(losses).float().mean()
        report = torch.stack([total, shut, *(torch.full_like(total, float(flag)) for flag in (stop, save_failed))])
        if distributed.world_size() > 1:
            dist.all_reduce(report)
        self._there = report
        self._event = None
        if report.is_cuda:
            self._report = torch.empty(4, pin_memory=True).copy_(report, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._report = report

    def _read(self, position: int) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._report[position])

    @property
    def factor(self) -> Tensor:
        """Of the loss: NaN, so that its gradient is, where any rank's loss is not finite, else 1; nothing is read."""
        return torch.where(self._there[0].isfinite(), 1.0, torch.nan)

    @property
    def loss(self) -> float:
        return self._read(0) / distributed.world_size()

    @property
    def finite(self) -> bool:
        return self.loss - self.loss == 0

    @property
    def shut(self) -> bool:
        return self._read(1) > 0

    @property
    def stop(self) -> bool:
        return self._read(2) > 0

    @property
    def save_failed(self) -> bool:
        return self._read(3) > 0


class Meter:
    """Images a second and the share of time spent waiting for data, since last read."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._reset()

    def _reset(self) -> None:
        self._began, self._waited, self._paused, self.steps = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._began - self._paused
        rates = {"images_per_second": self.steps * self.batch / elapsed, "data_wait": self._waited / elapsed}
        self._reset()
        return rates
