"""Pretrain an encoder: SimCLR, SupCon, SimSiam or supervised, with penalties and adversarial views.

  deepspeed launch/pretrain.py                                the embedded data set, a small ResNet: minutes on 2 cores
  deepspeed launch/pretrain.py configs/pretrain/simclr_imagenet.yaml data.root=/data/imagenet optimizer.lr=0.3
  torchrun --nproc-per-node 8 launch/pretrain.py ...          the same under torchrun
  python launch/pretrain.py ...                               one process

First a YAML file (optional), then key=value with dots. The same command run again goes on from its last checkpoint.
Ctrl-C, or SIGTERM or SIGUSR1 to a rank, saves a checkpoint at the next step and exits with code 75 (a second Ctrl-C
ends at once); a mistake exits with code 2; when a rank is lost the others name it and exit with code 76.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from fasttrain import cli, distributed, engine, export, plots
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import Loader, LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.evaluation.online import EvaluateConfig, OnlineKNN
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.objectives import build_objective, check_term
from fasttrain.optim import OptimizerConfig
from fasttrain.precision import autocast_dtype
from fasttrain.run import Run, RunConfig, read_metrics
from fasttrain.step import Term, TrainStep
from fasttrain.views import ViewedTermConfig, build_view


class PretrainConfig(Config):
    """Every part's own settings; the defaults are a run of minutes on 2 CPU cores."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig(size=32, jitter=0.5, blur=0.0, eval_crop=1.0)
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig(arch="resnet18", stem="cifar", width=0.25, head=HeadConfig(width=128, out=64))
    terms: dict[str, ViewedTermConfig] = Field(
        {"simclr": ViewedTermConfig(objective="nt_xent", temperature=0.2)}, min_length=1
    )
    optimizer: OptimizerConfig = OptimizerConfig(name="sgd", lr=0.5, weight_decay=1e-4, warmup_epochs=1)
    train: engine.TrainConfig = engine.TrainConfig(epochs=24, batch=128)
    evaluate: EvaluateConfig = EvaluateConfig(every_epochs=4)


def pretrain(config: PretrainConfig) -> int:
    device = distributed.initialize(config.train.device, deterministic=config.train.deterministic)
    config = config.model_copy(update={"train": config.train.on(device)})
    torch.manual_seed(config.run.seed)
    with Run(config.run) as run:
        parts = distributed.agree(lambda: build(config, device))
        run.say("\n".join(catalog.summary() for catalog in parts.catalogs))
        fingerprint = parts.catalogs[0].fingerprint
        if not engine.fit(parts.module, config, parts.plan, parts.loader, fingerprint, run, device, parts.evaluations):
            return cli.EXIT_SAVED_ON_SIGNAL
        if distributed.rank() == 0:
            weights = export.export(parts.module.encoder, run.dir, step=parts.plan.steps)
            print(summary(run, weights, plots.curves(run.dir)))
    return 0


class Parts(NamedTuple):
    catalogs: list[Catalog]
    loader: Loader
    module: TrainStep
    plan: engine.Plan
    evaluations: list[engine.Callback]


def build(config: PretrainConfig, device: torch.device) -> Parts:
    """All that can be wrong about the configuration or the data is found here, before ranks wait for each other."""
    rank, world = distributed.rank(), distributed.world_size()
    roles = ("train", "val") if config.evaluate.every_epochs else ("train",)
    catalogs = [open_catalog(config.data, role) for role in roles]
    micro_batch = config.train.micro_batch(world) * world
    order = Order(catalogs[0].indices, config.run.seed, micro_batch, config.train.accumulation)
    plan = engine.plan(config.train, config.optimizer, order)
    compared = config.train.batch if config.train.loss_over == "batch" else micro_batch
    for term in config.terms.values():
        check_term(term, config.model, config.augment.views, len(catalogs[0].classes), compared)
    encoder = Encoder(config.model).to(device)
    terms = [
        Term(
            name,
            build_objective(term),
            term.weight,
            build_view(term, encoder, config.run.seed, config.train.accumulation),
        )
        for name, term in config.terms.items()
    ]
    augment = SimCLR(config.augment, config.run.seed)
    loader = make_loader(config.loader, catalogs[0], order, augment, device, rank, world)
    evaluations = []
    if config.evaluate.every_epochs:
        autocast = autocast_dtype(config.train.precision)
        knn = OnlineKNN(config.evaluate, catalogs, config.augment, config.loader, encoder, device, autocast)
        evaluations = [engine.Callback(max(1, round(config.evaluate.every_epochs * plan.steps_per_epoch)), knn)]
    return Parts(catalogs, loader, TrainStep(encoder, terms), plan, evaluations)


def summary(run: Run, weights: Path, picture: Path) -> str:
    """What a person wants to know at the end."""
    metrics = read_metrics(run.dir / "metrics.jsonl")
    rates = sorted(line["images_per_second"] for line in metrics if "images_per_second" in line)
    knn = [line["knn_top1"] for line in metrics if "knn_top1" in line]
    lines = {"run": run.dir, "weights": weights, "picture": picture}
    if knn:
        lines = {
            "kNN accuracy": f"{100 * knn[-1]:.1f} % trained, {100 * knn[0]:.1f} % the same encoder untrained"
        } | lines
    if rates:
        lines = {"images per second": f"{rates[len(rates) // 2]:.1f}"} | lines
    return "\n" + "\n".join(f"{name:20s}{value}" for name, value in lines.items())


if __name__ == "__main__":
    cli.main(PretrainConfig, pretrain, __doc__)
