"""Make an encoder robust by FARE: keep the embeddings of attacked images where the clean ones were.

  deepspeed launch/finetune.py source=runs/pretrain                       a run's folder, on the run's own data
  deepspeed launch/finetune.py configs/finetune/fare_cifar10.yaml source=runs/simclr_cifar10 data.root=/data/cifar10
  deepspeed launch/finetune.py configs/finetune/fare_imagenet.yaml source=resnet50.pth model.arch=resnet50
  torchrun --nproc-per-node 8 launch/finetune.py ...                      the same under torchrun

First a YAML file (optional), then key=value with dots. The same command run again goes on from its last checkpoint.
Ctrl-C, or SIGTERM or SIGUSR1 to a rank, saves a checkpoint at the next step and exits with code 75 (a second Ctrl-C
ends at once); a mistake exits with code 2; when a rank is lost the others name it and exit with code 76.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fasttrain import cli, distributed, engine, export, inherited, plots
from fasttrain.accuracies import UPPER_BOUND, attack_text, interval_text, percent
from fasttrain.attacks import AttackConfig
from fasttrain.config import Config, PathText, Where
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import Catalog, DataConfig
from fasttrain.data.loader import Loader, LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.evaluation.images import catalog_features, thin
from fasttrain.evaluation.linear import LinearConfig, fit_classifier
from fasttrain.evaluation.online import open_measured
from fasttrain.evaluation.robust import OnlineRobust, RobustConfig
from fasttrain.export import ExportConfig, load_encoder
from fasttrain.models import Encoder, ModelConfig
from fasttrain.models.reference import keep_in_evaluation
from fasttrain.objectives import FareConfig, Reference, fare, fare_one_sided, surrogate_one_sided
from fasttrain.optim import OptimizerConfig
from fasttrain.precision import autocast_dtype
from fasttrain.printable import printable
from fasttrain.run import Run, RunConfig, read_metrics
from fasttrain.step import Term, TrainStep
from fasttrain.views import adversarial

import torch
from pydantic import Field, model_validator
from torch import nn


class ClassifierConfig(Config):
    """The linear classifier that accuracies are measured with, fitted once, to the source's clean features."""

    bank: int | None = Field(None, ge=1)
    "training images to fit it to, evenly spaced over the listing; null: all"
    batch: int = Field(256, ge=1)
    "images each rank encodes (or, in an evaluation, attacks) at a time"
    linear: LinearConfig = LinearConfig()


class OnlineRobustConfig(RobustConfig):
    """Clean and robust accuracy while training."""

    every_steps: int = Field(1000, ge=0)
    "steps between two evaluations (and before the first step and after the last); 0: never"

    reads: ClassVar[dict[str, Where]] = {"attack": Where("every_steps"), "images": Where("every_steps")}


class FinetuneConfig(Config):
    """Every part's own settings; the defaults are the paper's for CIFAR-10."""

    source: PathText
    "the encoder to start from: a run's folder or a weights file"
    model: ModelConfig | None = None
    "architecture, of weights that say nothing of theirs (model.arch, model.stem, model.width, …)"
    run: RunConfig = RunConfig(dir="runs/finetune")
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig(
        views=1, size=32, scale=(1, 1), ratio=(1, 1), flip=0, jitter_p=0, grey=0, blur=0, eval_crop=1
    )
    loader: LoaderConfig = LoaderConfig()
    fare: FareConfig = FareConfig()
    attack: AttackConfig = AttackConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw",
        lr=1e-4,
        lr_scaling="none",
        weight_decay=1e-4,
        betas=(0.9, 0.95),
        warmup_epochs=0,
        warmup_steps=1400,
    )
    train: engine.TrainConfig = engine.TrainConfig(steps=20000, batch=256)
    classifier: ClassifierConfig = ClassifierConfig()
    robust: OnlineRobustConfig = OnlineRobustConfig(images=10000)
    export: ExportConfig = ExportConfig()

    reads: ClassVar[dict[str, Where]] = {"classifier": Where("classifies", why="robust.every_steps=0")}

    @property
    def classifies(self) -> bool:
        """Whether a linear classifier has a use: to measure accuracy, or to attack."""
        return bool(self.robust.every_steps) or self.fare.against == "cross_entropy"

    @model_validator(mode="after")
    def _parts_fit(self) -> FinetuneConfig:
        if self.augment.views != 1:
            raise ValueError(f"augment.views={self.augment.views}: FARE looks at each image once, set augment.views=1")
        if not self.attack.eps_255:
            raise ValueError(
                "attack.eps_255=0: an image that is not moved keeps its embedding, and there is nothing to learn: give "
                "a radius, attack.eps_255=8 say"
            )
        if self.attack.batchnorm == "train" and self.fare.batchnorm == "eval":
            raise ValueError(
                "attack.batchnorm=train needs an encoder that trains so: set attack.batchnorm=eval or "
                "fare.batchnorm=train"
            )
        if self.attack.starts_at_image and self.fare.against == "distance":
            raise ValueError(
                f"attack.name={self.attack.name} would start at the image, where encoder and reference agree and the "
                "distance has no gradient: use attack.name=apgd, or pgd with attack.random_start=true"
            )
        return self


def finetune(config: FinetuneConfig) -> int:
    device = distributed.initialize(config.train.device, deterministic=config.train.deterministic)
    begun = distributed.on_rank_zero(lambda: any(Path(config.run.dir, "checkpoints").glob("step-*")))
    there = begun and config.model is not None  # the source's weights come with the checkpoint
    encoder = Encoder(config.model) if there else distributed.agree(lambda: load_encoder(config.source, config.model))
    encoder = encoder.to(device)
    config = config.model_copy(update={"train": config.train.on(device), "model": encoder.config})
    torch.manual_seed(config.run.seed)
    with Run(config.run) as run:
        parts = distributed.agree(lambda: build(config, encoder, device))
        for line in "\n".join(catalog.summary() for catalog in parts.catalogs).split("\n"):
            run.say(line)
        if not parts.evaluations:
            config = config.model_copy(update={"robust": config.robust.model_copy(update={"every_steps": 0})})
        fingerprint = parts.catalogs[0].fingerprint
        if parts.classifier is not None and not begun:  # else it comes with the checkpoint
            fit_to_clean_features(parts.classifier, config, encoder, parts.catalogs[0], device)
        if not engine.fit(parts.module, config, parts.plan, parts.loader, fingerprint, run, device, parts.evaluations):
            return cli.EXIT_SAVED_ON_SIGNAL
        if distributed.rank() == 0:
            print(summary(run, config.robust.attack))
            form = config.augment, config.export.normaliser
            weights = export.export(encoder, run.dir, *form, step=parts.plan.steps, finetuned_from=config.source)
            print(printable(f"{'weights':20s}{weights}"))
            print(printable(f"{'picture':20s}{plots.curves(run.dir, len(parts.catalogs[0].classes))}"))
            run.done()
    return 0


class Parts(NamedTuple):
    catalogs: list[Catalog]
    loader: Loader
    module: TrainStep
    classifier: nn.Linear | None
    plan: engine.Plan
    evaluations: list[engine.Callback]


def build(config: FinetuneConfig, encoder: Encoder, device: torch.device) -> Parts:
    """All that can be wrong about the configuration or the data is found here, before ranks wait for each other."""
    rank, world = distributed.rank(), distributed.world_size()
    catalogs = open_measured(
        config.data, "robust.every_steps" if config.robust.every_steps else None, config.run.keep_best
    )
    measured, labels = len(catalogs) == 2, config.fare.against == "cross_entropy"
    if labels:
        catalogs[0].require_labels("fare.against=cross_entropy", ", or use fare.against=distance, which needs none")
    micro_batch = config.train.micro_batch(world) * world
    order = Order(catalogs[0].indices, config.run.seed, micro_batch, config.train.accumulation)
    plan = engine.plan(config.train, config.optimizer, order)
    augment = SimCLR(config.augment, config.run.seed)
    loader = make_loader(config.loader, catalogs[0], order, augment, device, rank, world)

    needed = measured or labels
    classifier = nn.Linear(encoder.backbone.num_features, len(catalogs[0].classes)).to(device) if needed else None
    reference = Reference(encoder, classifier)
    if config.fare.batchnorm == "eval":
        keep_in_evaluation(encoder)
    against = fare_one_sided() if config.fare.against == "distance" else surrogate_one_sided(classifier)
    attacked = adversarial(config.attack, against, config.run.seed, accumulation=config.train.accumulation)
    terms = [Term("adversarial", fare(), 1.0, attacked), Term("clean", fare(), config.fare.alpha)]

    evaluations = []
    if measured:
        autocast = autocast_dtype(config.train.precision)
        where = config.classifier.batch, catalogs[1], config.augment, config.loader
        robust = OnlineRobust(config.robust, *where, encoder, classifier, device, autocast)
        evaluations = [engine.Callback(config.robust.every_steps, robust, robust.metrics)]
    return Parts(catalogs, loader, TrainStep(encoder, terms, prepare=reference), classifier, plan, evaluations)


@torch.no_grad()
def fit_to_clean_features(
    classifier: nn.Linear, config: FinetuneConfig, encoder: Encoder, train: Catalog, device: torch.device
) -> None:
    """Give ``classifier`` the weights that fit the labels of the training images best, on all ranks the same."""
    indices = thin(train.indices, config.classifier.bank)
    autocast = autocast_dtype(config.train.precision)
    features = catalog_features(
        encoder, train, indices, config.classifier.batch, config.augment, config.loader, device, autocast
    )
    found = fit_classifier(features, classifier.out_features, config.classifier.linear)
    classifier.weight.copy_(found.weight)
    classifier.bias.copy_(found.bias)


def summary(run: Run, attack: AttackConfig) -> str:
    """What a person wants to know at the end."""
    metrics = read_metrics(run.dir / "metrics.jsonl")
    lines = {}
    for key in ("clean_top1", "robust_top1"):
        if values := [line[key] for line in metrics if key in line]:
            lines[key] = f"{percent(values[-1])} fine-tuned, {percent(values[0])} the source"
    images = [int(line["robust_images"]) for line in metrics if "robust_images" in line]
    if "robust_top1" in lines and images and math.isfinite(values[-1]):
        lines["robust_top1"] = f"{interval_text(values[-1], images[-1])} fine-tuned, {percent(values[0])} the source"
        lines["under"] = f"{attack_text(attack.model_dump())}: {UPPER_BOUND}"
    lines |= {"run": run.dir}
    return "\n" + "\n".join(printable(f"{name:20s}{value}") for name, value in lines.items())


def of_source(given: dict[str, Any]) -> dict[str, Any]:
    """The data, loader and image size of the run to start from, where nothing else is asked for.

    A run that goes on has them in its own folder, and the architecture too: it needs its source no more.
    """
    begun = inherited.settings_of_begun(given, FinetuneConfig.model_fields["run"].default.dir)
    saved = begun or inherited.settings_of(given.get("source"))
    sections = inherited.data_of(saved, given) | ({"model": begun["model"]} if "fare" in begun else {})
    sizes = {key: saved["augment"][key] for key in ("size", "eval_crop") if key in saved.get("augment", {})}
    return sections | ({"augment": sizes} if sizes else {})


if __name__ == "__main__":
    cli.main(FinetuneConfig, finetune, __doc__, base=of_source)
