"""The network and the random images that the benchmarks of steps and attacks work on."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.models import Encoder, ModelConfig
from fasttrain.precision import Precision, autocast_dtype, decide


class NetworkConfig(Config):
    """A network at its random start, and the random images it is fed."""

    model: ModelConfig = ModelConfig(arch="resnet18", stem="cifar", zero_init_residual=False)
    size: int = Field(32, ge=8)
    "pixels of an image's side"
    batch: int | None = Field(None, ge=2)
    "images a step, of which contrastive objectives see two views; null: 64 on a CPU, 512 on a GPU"
    precision: Precision = "auto"
    "autocast of our steps and attacks (auto: bf16 where the hardware has it, else fp32)"
    steps: int | None = Field(None, ge=1)
    "steps a round; null: 1 on a CPU, 10 on a GPU"


class Setting(NamedTuple):
    """What ``NetworkConfig`` comes to on the device at hand."""

    encoder: Encoder  # contiguous, in training mode; its running statistics are those of the images
    images: Tensor  # [2 B, 3, H, W], two views in [0, 1], contiguous
    autocast: torch.dtype | None
    steps: int

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def precision(self) -> str:
        """Its name, for a table."""
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.autocast]

    def batch(self, views: int, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """``views`` of each of the B images."""
        count = len(self.images) // 2
        images = self.images[: views * count].contiguous(memory_format=memory_format).unflatten(0, (views, count))
        index = torch.arange(count, device=self.device)
        return Batch(images, torch.zeros_like(index), index)


def setting(config: NetworkConfig) -> Setting:
    """The encoder and the images, from a fixed seed, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    encoder = Encoder(config.model).to(device)
    images = blobs(config.batch or (512 if gpu else 64), config.size).to(device)
    settle(encoder, images)
    autocast = autocast_dtype(decide(config.precision, device))
    return Setting(encoder, images, autocast, config.steps or (10 if gpu else 1))


def blobs(count: int, size: int) -> Tensor:
    """Two noisy views of each of ``count`` images of random blobs [2 B, 3, H, W], in [0, 1], view-major.

    White noise would not do as well: its features hardly differ between images, and the head's BatchNorm enlarges what
    rounding does to them (twice the error in a float32 gradient).
    """
    images = F.interpolate(torch.rand(count, 3, 4, 4), size=(size, size), mode="bicubic").repeat(2, 1, 1, 1)
    return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


@torch.no_grad()
def settle(encoder: Encoder, images: Tensor) -> None:
    """Give every BatchNorm the running statistics of ``images``, without which an evaluation-mode network explodes."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    encoder.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def plain(encoder: Encoder) -> Encoder:
    """A copy, as contiguous as ``encoder``, whose convolutions and BatchNorms are torch's own."""
    twin = copy.deepcopy(encoder)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if (own := _torchs(child)) is not None:
                own.load_state_dict(child.state_dict())
                setattr(module, name, own)
    return twin


def _torchs(layer: nn.Module) -> nn.Module | None:
    """torch's own layer of the kind, where ``layer`` is a convolution or a BatchNorm."""
    if isinstance(layer, nn.Conv2d):
        shape = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        return nn.Conv2d(*shape, layer.dilation, layer.groups, layer.bias is not None, device=layer.weight.device)
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        if isinstance(layer, kind):
            norm = kind(layer.num_features, affine=layer.affine, device=layer.running_mean.device)
            if layer.bias is None:
                norm.bias = None
            return norm
    return None


def channels_last(encoder: Encoder) -> Encoder:
    """A copy whose weights are channels-last."""
    return copy.deepcopy(encoder).to(memory_format=torch.channels_last)


__all__ = ["NetworkConfig", "Setting", "channels_last", "plain", "setting"]
