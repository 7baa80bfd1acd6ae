"""What an attack in a training step launches on a GPU, and that it never waits for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fasttrain.attacks import AttackConfig
from fasttrain.attacks.structured import StructuredConfig
from fasttrain.data import Batch
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.folding import fold_batchnorm
from fasttrain.models.frozen import FrozenChain
from fasttrain.objectives import Reference, fare_one_sided, info_nce, sup_con_one_sided
from fasttrain.views import View, adversarial, structured
from tests.launches import Watch, as_on_a_gpu

pytest.importorskip("triton")


def _encoder() -> Encoder:
    torch.manual_seed(0)
    config = ModelConfig(arch="resnet18", stem="cifar", width=0.125, zero_init_residual=False, head=HeadConfig(out=16))
    return Encoder(config).to(memory_format=torch.channels_last)


def _batch(views: int) -> Batch:
    images = torch.rand(views * 8, 16, 16, 3).view(views, 8, 16, 16, 3).permute(0, 1, 4, 2, 3)
    return Batch(images, torch.arange(8) % 3, torch.arange(8))


def _attacked(config: dict | None = None, against=None) -> Callable[[Encoder], View]:
    return lambda encoder: adversarial(AttackConfig(**config or {}), against or info_nce(0.5), seed=0)


def _structured(*names: str) -> Callable[[Encoder], View]:
    config = StructuredConfig(transformations=names)
    return lambda encoder: structured(config, encoder.backbone.num_features)


VIEWS = {
    "fgsm": _attacked({"name": "fgsm"}),
    "pgd": _attacked({"name": "pgd", "steps": 2, "restarts": 2}),
    "pgd-l2": _attacked({"name": "pgd", "steps": 2, "norm": "l2"}),
    "apgd": _attacked({"steps": 3, "restarts": 2}),
    "apgd-train": _attacked({"steps": 2, "batchnorm": "train"}, sup_con_one_sided(0.5)),
    "structured": _structured("colour_space", "rotation", "translation", "colour_jitter"),
}


def _launched(view: Callable[[Encoder], View], batch: Batch) -> Watch:
    encoder = _encoder()
    made = view(encoder)
    with as_on_a_gpu() as watch, torch.autocast("cpu", torch.bfloat16):
        seen = made(encoder, batch)
    if seen.images.requires_grad:
        with watch:
            seen.images.sum().backward()
    return watch


def test_folding_is_a_few_operations_and_one_a_layer():
    encoder = _encoder()
    layers = sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in encoder.modules())
    with as_on_a_gpu() as watch, torch.autocast("cpu", torch.bfloat16):
        folded = fold_batchnorm(encoder)
    assert watch.total <= layers + 6 and not watch.waits
    inner = [chain for chain in folded.modules() if isinstance(chain, FrozenChain) and not chain.sees_images]
    assert all(tensor.dtype == torch.bfloat16 for chain in inner for tensor in chain.buffers())


@pytest.mark.parametrize("name", VIEWS)
def test_never_waits(name):
    watch = _launched(VIEWS[name], _batch(2))
    assert watch.total and not watch.waits


def test_launches_of_an_apgd_view_and_of_fare():
    """A pass over the network is 20 convolutions, its gradient 20, 17 ReLUs and 8 sums; the rest is to stay small."""
    batch = _batch(2)
    contrastive = _launched(_attacked(), batch).launches
    batch = batch._replace(images=batch.images[:1], targets=Reference(_encoder())(batch).targets[:8])
    fare = _launched(_attacked(against=fare_one_sided()), batch).launches
    convolutions = sum(number for name, number in fare.items() if "convolution" in name)
    assert convolutions == 11 * 20 + 10 * 20
    assert contrastive.total() <= 1250 and fare.total() <= 915
