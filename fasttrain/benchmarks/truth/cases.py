"""Training steps of each kind, on random batches that already lie on the device."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from fasttrain.attacks import AttackConfig
from fasttrain.benchmarks.loop import LoopConfig
from fasttrain.benchmarks.network import blobs
from fasttrain.data import Batch
from fasttrain.engine import TrainConfig
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.reference import keep_in_evaluation
from fasttrain.objectives import Reference, fare, fare_one_sided, gradient_penalty, info_nce, nt_xent
from fasttrain.optim import OptimizerConfig
from fasttrain.step import Term, TrainStep
from fasttrain.views import adversarial

Kind = Literal["plain", "penalty", "pgd-5", "fare"]


class StepCase(NamedTuple):
    """A step of a kind: of what network, on how many images of how many pixels."""

    kind: Kind
    arch: str = "resnet18"
    size: int = 32
    images: int = 256

    def on(self, device: torch.device) -> StepCase:
        """Itself, or what of it suits a CPU."""
        return self if device.type == "cuda" else self._replace(arch="resnet18", size=16, images=4)

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.arch} at {self.size}, {self.images} images"


class Made(NamedTuple):
    """It on a device."""

    module: TrainStep
    config: LoopConfig
    batch: Batch

    @property
    def views(self) -> int:
        """Of all images together."""
        return self.batch.images.shape[0] * self.batch.images.shape[1]


def make(case: StepCase, device: torch.device, optimizer: str = "", **train: Any) -> Made:
    """From a fixed seed; ``optimizer`` is by default what the kind is trained with. On a CPU it is narrow too."""
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    size, images = case.size, case.images
    stem, width, out = ("cifar" if case.size < 100 else "imagenet"), (1.0 if gpu else 0.0625), (128 if gpu else 16)
    head = HeadConfig(out=out, **({} if gpu else {"width": 16}))
    encoder = Encoder(ModelConfig(arch=case.arch, stem=stem, width=width, zero_init_residual=False, head=head)).to(
        device
    )
    prepare = None
    if case.kind == "plain":
        terms = [Term("simclr", nt_xent(0.5))]
    elif case.kind == "penalty":
        terms = [Term("simclr", gradient_penalty(nt_xent(0.5), 0.1))]
    elif case.kind == "pgd-5":
        view = adversarial(AttackConfig(name="pgd", steps=5), info_nce(0.5), seed=0).to(device)
        terms = [Term("simclr", nt_xent(0.5), view=view)]
    else:
        prepare = Reference(encoder)
        keep_in_evaluation(encoder)
        view = adversarial(AttackConfig(), fare_one_sided(), seed=0).to(device)
        terms = [Term("adversarial", fare(), view=view), Term("clean", fare(), 0.1)]
    views = 1 if case.kind == "fare" else 2
    name = optimizer or ("adamw" if case.kind == "fare" else "lars")
    train = {"batch": images * train.get("accumulation", 1), **train}
    config = LoopConfig(train=TrainConfig(**train).on(device), optimizer=OptimizerConfig(name=name, lr=0.05))
    return Made(TrainStep(encoder, terms, prepare), config, _batch(views, images, size, device))


def _batch(views: int, images: int, size: int, device: torch.device) -> Batch:
    """As the loaders have it: of pixels whose channels come last."""
    flat = blobs(images, size)[: views * images].permute(0, 2, 3, 1).contiguous().to(device)
    index = torch.arange(images, device=device)
    return Batch(flat.unflatten(0, (views, images)).permute(0, 1, 4, 2, 3), index % 10, index)


__all__ = ["Kind", "Made", "StepCase", "make"]
