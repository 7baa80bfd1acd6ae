"""Evaluate an encoder: kNN, a linear probe on its frozen features, or that probe's accuracy under attack.

  python launch/eval.py knn    runs/pretrain                              a run's folder, on the run's own data
  python launch/eval.py linear runs/pretrain data.root=/data/cifar10
  python launch/eval.py linear resnet50.pth model.arch=resnet50 data.root=/data/imagenet augment.size=224
  python launch/eval.py robust runs/finetune robust.attack.eps_255=4 robust.attack.steps=50 robust.images=1000
  torchrun --nproc-per-node 8 launch/eval.py knn …                        features and bank sharded over the ranks

Features are extracted once. The table is printed and written as JSON, by default beside what is evaluated;
the place is tried first. Features or scores that are not finite are an error, which says whose doing it is.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from fasttrain import cli, distributed, inherited
from fasttrain.config import Config, PathText, Where
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.knn import KNNConfig, knn
from fasttrain.evaluation.linear import LinearConfig, fit_classifier, linear_probe
from fasttrain.evaluation.online import catalog_features, evaluation_batches, thin
from fasttrain.evaluation.robust import RobustConfig, robust_accuracy
from fasttrain.export import load_encoder
from fasttrain.models import ModelConfig
from fasttrain.output import try_output, write_output
from fasttrain.precision import Precision, autocast_dtype, decide
from fasttrain.printable import printable

import torch.nn.functional as F
from pydantic import Field

ELSEWHERE = "choose another place with output=…"


class CropConfig(AugmentConfig):
    """What of an image an evaluation shows: its central square, whatever a training drew."""

    reads: ClassVar[dict[str, Where]] = {
        name: Where("draws", why="an evaluation draws nothing")
        for name in AugmentConfig.model_fields
        if name not in ("size", "eval_crop")
    }

    @property
    def draws(self) -> bool:
        """Whether anything is drawn."""
        return False


class EvalConfig(Config):
    """What to evaluate, how and on what."""

    task: Literal["knn", "linear", "robust"]
    "knn, linear or robust; the first argument"
    source: PathText
    "a run's folder or a weights file; the second argument"
    output: PathText | None = None
    "the JSON file; null: eval-<task>.json beside the weights"
    batch: int = Field(256, ge=1)
    "images each rank encodes at a time"
    bank: int | None = Field(None, ge=1)
    "training images to use, evenly spaced over the listing; null: all"
    device: distributed.Device = "auto"
    "auto: the GPU when there is one"
    precision: Precision = "auto"
    "of the features: auto is bf16 where the hardware has it, else fp32"
    model: ModelConfig | None = None
    "architecture, of weights that say nothing of theirs (model.arch, model.stem, model.width, …)"
    data: DataConfig = DataConfig()
    augment: CropConfig = CropConfig()
    loader: LoaderConfig = LoaderConfig()
    knn: KNNConfig = KNNConfig()
    linear: LinearConfig = LinearConfig()
    robust: RobustConfig = RobustConfig()

    reads: ClassVar[dict[str, Where]] = {
        "knn": Where("task", ("knn",)),
        "linear": Where("task", ("linear", "robust")),
        "robust": Where("task", ("robust",)),
    }


def evaluate(config: EvalConfig) -> None:
    device = distributed.initialize(config.device)
    began = time.perf_counter()
    encoder = distributed.agree(lambda: load_encoder(config.source, config.model)).to(device)
    source = Path(config.source)
    output = Path(config.output or (source if source.is_dir() else source.parent) / f"eval-{config.task}.json")
    distributed.on_rank_zero(lambda: try_output(output, ELSEWHERE))
    catalogs = distributed.agree(lambda: labelled(config))
    autocast = autocast_dtype(decide(config.precision, device))
    shares = [thin(catalogs[0].indices, config.bank), catalogs[1].indices]
    crop = config.augment, config.loader, device

    def features(split: int) -> Features:
        return catalog_features(encoder, catalogs[split], shares[split], config.batch, *crop, autocast)

    if config.task == "knn":
        found = knn(features(0), features(1), config.knn)
    elif config.task == "linear":
        found = linear_probe(features(0), features(1), config.linear)
    else:
        probe = fit_classifier(features(0), len(catalogs[0].classes), config.linear)
        shares[1] = thin(shares[1], config.robust.images)
        with evaluation_batches(catalogs[1], shares[1], config.batch, *crop) as batches:
            classify = partial(F.linear, weight=probe.weight, bias=probe.bias)
            found = robust_accuracy(encoder, classify, batches, config.robust.attack, device, autocast)
    if distributed.rank() != 0:
        return
    table = {
        "source": config.source,
        "train": {"where": str(catalogs[0].root), "images": len(shares[0])},
        "val": {"where": str(catalogs[1].root), "images": len(shares[1])},
        **found._asdict(),
        **({"attack": config.robust.attack.model_dump()} if config.task == "robust" else {}),
        "seconds": round(time.perf_counter() - began, 1),
    }
    for name, value in found._asdict().items():
        print(f"{name:16s}{100 * value:8.2f} %" if "top" in name else f"{name:16s}{value!s:>8}", flush=True)
    write_output(output, json.dumps(table, indent=1) + "\n", ELSEWHERE)
    print(f"{'written to':16s}{printable(output)}")


def labelled(config: EvalConfig) -> list[Catalog]:
    """Both splits, whose labels mean something."""
    catalogs = []
    for role in ("train", "val"):
        catalogs.append(open_catalog(config.data, role))
        catalogs[-1].require_labels(f"the accuracy of {config.task}")
    return catalogs


def of_run(given: dict[str, Any]) -> dict[str, Any]:
    """A run's own data, crops and loader, where nothing else is asked for."""
    saved = inherited.settings_of(given.get("source"))
    return inherited.data_of(saved, given) | {key: saved[key] for key in ("augment",) if key in saved}


if __name__ == "__main__":
    cli.main(EvalConfig, evaluate, __doc__, positional=("task", "source"), base=of_run)
