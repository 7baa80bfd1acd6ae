"""Pretrain an encoder: SimCLR, SupCon, SimSiam or supervised, with penalties and adversarial views.

  deepspeed launch/pretrain.py                                the embedded data set, a small ResNet: minutes on 2 cores
  deepspeed launch/pretrain.py configs/pretrain/simclr_imagenet.yaml data.root=/data/imagenet optimizer.lr=0.3
  deepspeed launch/pretrain.py model.weights=runs/pretrain run.dir=runs/longer        from a run's weights, or anyone's
  deepspeed launch/pretrain.py configs/protocols/alf_cifar10.yaml model.weights=…      a head on a frozen encoder
  torchrun --nproc-per-node 8 launch/pretrain.py ...          the same under torchrun
  python launch/pretrain.py ...                               one process

First a YAML file (optional), then key=value with dots. The same command run again goes on from its last checkpoint.
Ctrl-C, or SIGTERM or SIGUSR1 to a rank, saves a checkpoint at the next step and exits with code 75 (a second Ctrl-C
ends at once); a mistake exits with code 2; when a rank is lost the others name it and exit with code 76.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, NamedTuple

from fasttrain import cli, distributed, engine, export, inherited, plots
from fasttrain.accuracies import percent
from fasttrain.config import Config, PathText, Where
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import Catalog, DataConfig
from fasttrain.data.loader import Loader, LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.evaluation.online import EvaluateConfig, OnlineKNN, open_measured
from fasttrain.export import ExportConfig
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.reference import freeze_backbone
from fasttrain.objectives import build_objective, check_term
from fasttrain.optim import OptimizerConfig
from fasttrain.precision import autocast_dtype
from fasttrain.printable import printable
from fasttrain.run import Run, RunConfig, read_metrics
from fasttrain.step import Term, TrainStep
from fasttrain.views import ViewedTermConfig, build_view

import torch
from pydantic import Field, model_validator


class StartConfig(ModelConfig):
    """The encoder, and what it starts from."""

    weights: PathText | None = None
    """start from the backbone of these weights, with new heads: a run's folder or anyone's weights of a ResNet, whose
    arch, stem, width, mean and std hold where they are not given; null: from random weights"""

    frozen: bool = False
    """train the heads alone: the backbone stays as its weights are, to the bit, its BatchNorm in evaluation mode"""

    reads: ClassVar[dict[str, Where]] = {"zero_init_residual": Where("weights", (None,))}

    @model_validator(mode="after")
    def _frozen_from_weights(self) -> StartConfig:
        if self.frozen and self.weights is None:
            raise ValueError(
                "frozen=true without weights would keep a random backbone: set model.weights to a run or a file"
            )
        return self


class PretrainConfig(Config):
    """Every part's own settings; the defaults are a run of minutes on 2 CPU cores."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig(size=32, jitter=0.5, blur=0.0, eval_crop=1.0)
    loader: LoaderConfig = LoaderConfig()
    model: StartConfig = StartConfig(arch="resnet18", stem="cifar", width=0.25, head=HeadConfig(width=128, out=64))
    terms: dict[str, ViewedTermConfig] = Field(
        {"simclr": ViewedTermConfig(objective="nt_xent", temperature=0.2)}, min_length=1
    )
    optimizer: OptimizerConfig = OptimizerConfig(name="sgd", lr=0.5, weight_decay=1e-4, warmup_epochs=1)
    train: engine.TrainConfig = engine.TrainConfig(epochs=24, batch=128)
    evaluate: EvaluateConfig = EvaluateConfig(every_epochs=4)
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _frozen_is_attacked_as_it_is(self) -> PretrainConfig:
        for name, term in self.terms.items():
            if self.model.frozen and term.view.kind == "attack" and term.view.attack.batchnorm == "train":
                raise ValueError(
                    f"terms.{name}.view.attack.batchnorm=train: with model.frozen=true the backbone's does not train: "
                    "set it to eval"
                )
        return self

    def doubts(self) -> list[str]:
        every = self.evaluate.every_epochs
        if not self.model.frozen or not every:
            return []
        return [f"evaluate.every_epochs={every:g}: the kNN accuracy of model.frozen=true stays as it is; 0 spares it"]


def pretrain(config: PretrainConfig) -> int:
    device = distributed.initialize(config.train.device, deterministic=config.train.deterministic)
    config = config.model_copy(update={"train": config.train.on(device)})
    torch.manual_seed(config.run.seed)
    with Run(config.run) as run:
        parts = distributed.agree(lambda: build(config, device))
        for line in "\n".join(catalog.summary() for catalog in parts.catalogs).split("\n"):
            run.say(line)
        if not parts.evaluations:
            evaluate = config.evaluate.model_copy(update={"every_epochs": 0.0})
            config = config.model_copy(update={"evaluate": evaluate})
        begun = distributed.on_rank_zero(lambda: any(run.checkpoints.glob("step-*")))
        if config.model.weights is not None and not begun:  # else they come with the checkpoint
            distributed.agree(lambda: export.load_backbone(parts.module.encoder, config.model.weights))
        fingerprint = parts.catalogs[0].fingerprint
        if not engine.fit(parts.module, config, parts.plan, parts.loader, fingerprint, run, device, parts.evaluations):
            return cli.EXIT_SAVED_ON_SIGNAL
        if distributed.rank() == 0:
            start = "untrained" if config.model.weights is None else f"from {config.model.weights}"
            print(summary(run, start))
            form = config.augment, config.export.normaliser
            weights = export.export(parts.module.encoder, run.dir, *form, step=parts.plan.steps)
            print(printable(f"{'weights':20s}{weights}"))
            print(printable(f"{'picture':20s}{plots.curves(run.dir, len(parts.catalogs[0].classes))}"))
            run.done()
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
    every = config.evaluate.every_epochs
    catalogs = open_measured(config.data, "evaluate.every_epochs" if every else None, config.run.keep_best)
    micro_batch = config.train.micro_batch(world) * world
    order = Order(catalogs[0].indices, config.run.seed, micro_batch, config.train.accumulation)
    plan = engine.plan(config.train, config.optimizer, order)
    compared = config.train.batch if config.train.loss_over == "batch" else micro_batch
    for term in config.terms.values():
        check_term(term, config.model, config.augment.views, len(catalogs[0].classes), compared)
    encoder = Encoder(config.model).to(device)
    if config.model.frozen:
        freeze_backbone(encoder)
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
    if len(catalogs) == 2:
        autocast = autocast_dtype(config.train.precision)
        knn = OnlineKNN(config.evaluate, catalogs, config.augment, config.loader, encoder, device, autocast)
        evaluations = [engine.Callback(max(1, round(every * plan.steps_per_epoch)), knn, knn.metrics)]
    return Parts(catalogs, loader, TrainStep(encoder, terms), plan, evaluations)


def summary(run: Run, start: str) -> str:
    """What a person wants to know at the end."""
    metrics = read_metrics(run.dir / "metrics.jsonl")
    rates = sorted(line["images_per_second"] for line in metrics if "images_per_second" in line)
    knn = [line["knn_top1"] for line in metrics if "knn_top1" in line]
    lines: dict[str, object] = {"run": run.dir}
    if knn:
        lines = {"kNN accuracy": f"{percent(knn[-1])} trained, {percent(knn[0])} the same encoder {start}"} | lines
    if rates:
        lines = {"images per second": f"{rates[len(rates) // 2]:.1f}"} | lines
    return "\n" + "\n".join(printable(f"{name:20s}{value}") for name, value in lines.items())


def of_weights(given: dict[str, Any]) -> dict[str, Any]:
    """What the weights to start from say of themselves; a run that goes on has it in its own folder."""
    model = given.get("model")
    weights = model.get("weights") if isinstance(model, dict) else None
    if not isinstance(weights, str) or not weights:
        return {}
    begun = inherited.settings_of_begun(given, RunConfig().dir)
    found = begun.get("model") or export.read_source(os.path.expanduser(weights)).model.model_dump()
    return {"model": {name: found[name] for name in export.WHAT_IT_IS if name in found}}


if __name__ == "__main__":
    cli.main(PretrainConfig, pretrain, __doc__, base=of_weights)
