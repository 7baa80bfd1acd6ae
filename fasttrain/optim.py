"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from fasttrain.config import Config, Where
from fasttrain.errors import UsageError

APEX_INSTALL = (
    "pip uninstall -y apex; git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


class OptimizerConfig(Config):
    """The update rule and its schedule. The peak learning rate is derived here and nowhere else."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    "lars (SimCLR's), adamw or sgd (with momentum)"
    lr: float = Field(0.3, gt=0)
    "learning rate before scaling by the batch"
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    "peak = lr * batch/256, lr * sqrt(batch/256), or lr"
    weight_decay: float = Field(1e-6, ge=0)
    "L2 (lars, sgd) or decoupled (adamw); biases and BatchNorm are excluded"
    momentum: float = Field(0.9, ge=0, lt=1)
    "of lars and sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    "of adamw"
    trust_coefficient: float = Field(0.001, gt=0)
    "eta of lars"
    schedule: Literal["cosine", "constant", "restarts", "steps"] = "cosine"
    """after the warm-up: one cosine to zero at the last step, the peak for ever, cosines to zero one after another
    (SGDR), or the peak, divided by 10 at each milestone; a run with one of the last three can be made longer"""
    cycle_epochs: float = Field(10, gt=0)
    "restarts: epochs of the first cosine"
    cycle_growth: int = Field(1, ge=1)
    "restarts: how many times as long as the one before each further cosine is"
    milestones: tuple[float, ...] = ()
    "steps: epochs after which the learning rate is a tenth of what it was, [10, 20] say"
    warmup_epochs: float = Field(10, ge=0)
    "epochs of linear warm-up"
    warmup_steps: int = Field(0, ge=0)
    "steps of linear warm-up, in place of epochs: with warmup_epochs=0"
    implementation: Literal["auto", "torch", "apex"] = "auto"
    "auto: torch's fused kernels where the device has them; apex: NVIDIA apex's (adamw, sgd)"

    reads: ClassVar[dict[str, Where]] = {
        "momentum": Where("name", ("lars", "sgd")),
        "betas": Where("name", ("adamw",)),
        "trust_coefficient": Where("name", ("lars",)),
        "cycle_epochs": Where("schedule", ("restarts",)),
        "cycle_growth": Where("schedule", ("restarts",)),
        "milestones": Where("schedule", ("steps",)),
    }

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimizerConfig:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs:g} and warmup_steps={self.warmup_steps}: set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _milestones_in_order(self) -> OptimizerConfig:
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule=steps without milestones: give epochs, milestones=[10, 20] say, or use constant")
        if list(self.milestones) != sorted({epoch for epoch in self.milestones if epoch > 0}):
            raise ValueError(f"milestones=[{_listed(self.milestones)}]: give epochs above 0, each later than the last")
        return self

    def warmup(self, steps_per_epoch: int) -> int:
        """Steps of warm-up."""
        return self.warmup_steps or round(self.warmup_epochs * steps_per_epoch)

    def cycle(self, steps_per_epoch: int) -> int:
        """Steps of the first cosine of ``schedule=restarts``."""
        return round(self.cycle_epochs * steps_per_epoch)

    def falls(self, steps_per_epoch: int, total: int) -> list[int]:
        """Steps from which on the learning rate is a tenth of what it was, of ``schedule=steps``.

        Raises:
            UsageError: one of them is not within the run.
        """
        if self.schedule != "steps":
            return []
        late = [epoch for epoch in self.milestones if round(epoch * steps_per_epoch) >= total]
        if late:
            raise UsageError(
                f"optimizer.milestones=[{_listed(self.milestones)}]: {_listed(late)} is not before the run's "
                f"end, after {total / steps_per_epoch:.4g} epochs: leave it out, or train longer"
            )
        return [round(epoch * steps_per_epoch) for epoch in self.milestones]

    @property
    def depends_on_total(self) -> bool:
        """Whether the learning rate of a step depends on how many there will be."""
        return self.schedule == "cosine"

    def peak(self, batch: int) -> float:
        """Learning rate after warm-up, for a global batch of ``batch`` images (all ranks, all accumulation steps)."""
        return self.lr * {"linear": batch / 256, "sqrt": math.sqrt(batch / 256), "none": 1.0}[self.lr_scaling]


def _listed(epochs: Iterable[float]) -> str:
    return ", ".join(f"{epoch:g}" for epoch in epochs)


def schedule(
    peak: float,
    warmup: int,
    total: int,
    kind: str = "cosine",
    cycle: int = 0,
    growth: int = 1,
    falls: Sequence[int] = (),
) -> Callable[[int], float]:
    """Learning rate of step t = 0, 1, ...: ``peak (t+1)/W`` for t < W; after that, with u = t - W, by ``kind``

    cosine      ``peak/2 (1 + cos(pi u/(T-W)))``, T the steps in ``total``
    constant    ``peak``
    restarts    ``peak/2 (1 + cos(pi v/C))``, v steps into a cycle of C: the first has ``cycle`` steps, each further one
                ``growth`` times as many as the one before (SGDR, Loshchilov & Hutter 2017, with T_0, T_mult, and a
                least rate of 0)
    steps       ``peak/10^n``, n of the steps in ``falls`` at t or before

    Raises:
        UsageError: the warm-up is not shorter than the run, or a cycle is shorter than a step.
    """
    if warmup >= total > 0:
        raise UsageError(
            f"{warmup} steps of warm-up in a run of {total}: lower optimizer.warmup_epochs (or warmup_steps), or train "
            "longer"
        )
    if kind == "restarts" and cycle < 1:
        raise UsageError("optimizer.cycle_epochs is less than one step: make it longer")

    def learning_rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        if kind == "constant":
            return peak
        if kind == "steps":
            return peak / 10 ** sum(fall <= step for fall in falls)
        done, length = step - warmup, total - warmup
        if kind == "restarts":
            done, length = _within_cycle(done, cycle, growth)
        return peak / 2 * (1 + math.cos(math.pi * done / length))

    return learning_rate


def _within_cycle(step: int, cycle: int, growth: int) -> tuple[int, int]:
    """How many steps into its cycle ``step`` is, and how many that one has."""
    if growth == 1:
        return step % cycle, cycle
    while step >= cycle:
        step, cycle = step - cycle, cycle * growth
    return step, cycle


def build_optimizer(config: OptimizerConfig, model: nn.Module, zero_stage: int, device: torch.device):
    """The optimiser over ``model``'s trainable parameters; biases and BatchNorm's (ndim <= 1) are not decayed.

    A module with an attribute ``lr_factor`` (an adversary) has a group of its own: nothing of it is decayed or adapted,
    and its learning rate is that factor times the schedule's.

    ZeRO stages 1 and 2 hand an optimiser one flat partition a parameter *group*; LARS needs the norms of tensors, so
    there it gets one group a parameter, and sums squares over the ranks.
    """
    parts = [module for module in model.modules() if hasattr(module, "lr_factor")]
    apart = [{"params": [*m.parameters()], "weight_decay": 0.0, "lr_factor": m.lr_factor} for m in parts]
    own = {p for group in apart for p in group["params"]}
    parameters = [p for p in model.parameters() if p.requires_grad and p not in own]
    kernels = [p for p in parameters if p.ndim > 1]
    gains = [p for p in parameters if p.ndim <= 1]
    if config.name == "lars":
        if config.implementation == "apex":
            raise UsageError("optimizer.implementation=apex has no LARS: use auto, or optimizer.name=sgd or adamw")
        split = zero_stage > 0
        groups = [{"params": [p], "adapt": True} for p in kernels] if split else [{"params": kernels, "adapt": True}]
        groups += [{"params": [p], "adapt": False} for p in gains] if split else [{"params": gains, "adapt": False}]
        groups += [group | {"adapt": False} for group in apart]
        return LARS(groups, config.lr, config.momentum, config.weight_decay, config.trust_coefficient, sharded=split)
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}, *apart]
    groups = [group for group in groups if group["params"]]
    if config.implementation == "apex":
        optimizers = require_apex()
        if config.name == "adamw":
            return optimizers.FusedAdam(groups, lr=config.lr, betas=config.betas, adam_w_mode=True)
        return optimizers.FusedSGD(groups, lr=config.lr, momentum=config.momentum)
    fused = device.type == "cuda" and config.implementation == "auto"
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused or None)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused or None)


def require_apex():
    """NVIDIA apex's ``apex.optimizers``; the ``apex`` of PyPI is another project and is told apart."""
    try:
        import amp_C  # noqa: F401  (the compiled kernels: only NVIDIA's apex has them)
        from apex import optimizers
    except ImportError:
        raise UsageError(
            f"optimizer.implementation=apex needs NVIDIA apex with its CUDA kernels: {APEX_INSTALL} "
            "(or set optimizer.implementation=auto)"
        ) from None
    return optimizers


class LARS(torch.optim.Optimizer):
    r"""Layer-wise adaptive rate scaling, as in SimCLR.

    For an adapted tensor w with gradient g::

        d = g + lambda w
        v <- momentum v + lr * eta |w| / |d| * d        (the ratio is 1 where |w| or |d| is 0)
        w <- w - v

    A group with ``adapt=False`` (biases, BatchNorm) has d = g and ratio 1. The learning rate is inside the momentum
    buffer, as in Google's code; solo-learn and lightly put it outside and use ``|g| + lambda |w|`` below the line.

    Args:
        groups: parameter groups, each with the key ``adapt``.
        lr, momentum, weight_decay, trust_coefficient: lr, momentum, lambda and eta above.
        sharded: the parameters seen are this rank's shards (ZeRO 1 or 2, one group a parameter): norms are summed over
            the ranks, so the trust ratio is exactly that of the whole tensor.

    As torch's fused optimisers do, a step divides gradients by the attribute ``grad_scale`` and moves nothing where the
    attribute ``found_inf`` is 1, each a tensor of one number that the host does not read (:class:`torch.amp.GradScaler`
    and :class:`~fasttrain.nonfinite.Gate` set them).

    Source: You, Gitman, Ginsburg, arXiv:1708.03888; Chen et al., arXiv:2002.05709, appendix B.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
        sharded: bool = False,
    ) -> None:
        self.sharded = sharded
        groups = [group for group in groups if len(group["params"])]
        super().__init__(
            groups,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "adapt": True,
            },
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            updates: list[Tensor] = [p.grad for p in weights]
            if scale is not None:
                updates = list(torch._foreach_mul(updates, scale.double().reciprocal().float()))
            if group["adapt"]:
                updates = list(torch._foreach_add(updates, weights, alpha=group["weight_decay"]))
                torch._foreach_mul_(updates, list(self._trust_ratios(weights, updates, group["trust_coefficient"])))
            buffers = [self._buffer(p) for p in weights]
            if found_inf is not None:
                updates = list(torch._foreach_mul(updates, group["lr"]))
                rule = {"weight_decay": 0.0, "momentum": group["momentum"], "lr": 1.0, "dampening": 0.0}
                flags = {"nesterov": False, "maximize": False, "is_first_step": False}
                torch._fused_sgd_(weights, updates, buffers, **rule, **flags, found_inf=found_inf)
                continue
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=group["lr"])
            torch._foreach_sub_(weights, buffers)
        return loss

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _trust_ratios(self, weights: list[Tensor], updates: list[Tensor], eta: float) -> Iterable[Tensor]:
        norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(updates)]).view(2, -1)  # [2, P]
        if self.sharded and dist.is_initialized() and dist.get_world_size() > 1:
            squares = norms.square()
            dist.all_reduce(squares)
            norms = squares.sqrt()
        of_weights, of_updates = norms
        usable = (of_weights > 0) & (of_updates > 0)
        return torch.where(usable, eta * of_weights / of_updates, 1.0).unbind()
