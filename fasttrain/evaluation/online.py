"""kNN accuracy while training, on a labelled train/val pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from fasttrain.config import Config, Where
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog, DataConfig, NoSplit, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.errors import UsageError
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.images import catalog_features, thin
from fasttrain.evaluation.knn import KNNConfig, knn
from fasttrain.models import Encoder


class EvaluateConfig(Config):
    every_epochs: float = Field(5, ge=0)
    "epochs between two evaluations (and before the first step and after the last); 0: never"
    batch: int = Field(256, ge=1)
    "images each rank encodes at a time"
    bank: int | None = Field(None, ge=1)
    "training images in the bank, evenly spaced over the listing; null: all"
    knn: KNNConfig = KNNConfig()

    reads: ClassVar[dict[str, Where]] = {name: Where("every_epochs") for name in ("batch", "bank", "knn")}


def open_measured(data: DataConfig, key: str | None, keep_best: str | None) -> list[Catalog]:
    """The training split, and the validation split where accuracies are to be measured and can be.

    Where they cannot, a note of the training split says that the setting ``key`` (None: they are not to be) falls to 0.

    Raises:
        UsageError: ``keep_best`` wants what cannot be measured.
    """
    train = open_catalog(data, "train")
    if key is None:
        return [train]
    why = train.unlabelled
    if why is None:
        try:
            val = open_catalog(data, "val")
            why = val.unlabelled
        except NoSplit as missing:
            why = str(missing)
    if why is None:
        return [train, val]
    if keep_best is not None:
        raise UsageError(f"run.keep_best={keep_best}: no accuracy can be measured, since {why}")
    train.notes.append(f"{key} falls to 0, since {why}")
    return [train]


class OnlineKNN:
    """``(step) -> {"knn_top1": …}`` of the encoder as it stands; a callback for the training loop, run by all ranks.

    With fewer training images than ``knn.neighbours`` the report says how many were used.
    """

    metrics = ("knn_top1",)

    def __init__(
        self,
        config: EvaluateConfig,
        catalogs: Sequence[Catalog],
        augment: AugmentConfig,
        loader: LoaderConfig,
        encoder: Encoder,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.config, self.catalogs, self.augment, self.loader = config, catalogs, augment, loader
        self.encoder, self.device, self.autocast = encoder, device, autocast

    def __call__(self, step: int) -> dict[str, float]:
        train, val = self.catalogs
        bank = self.features(train, thin(train.indices, self.config.bank))
        found = knn(bank, self.features(val, val.indices), self.config.knn)
        lowered = {"knn_neighbours": found.neighbours} if found.note else {}
        return {"knn_top1": found.top1} | lowered

    def features(self, catalog: Catalog, indices: np.ndarray) -> Features:
        return catalog_features(
            self.encoder, catalog, indices, self.config.batch, self.augment, self.loader, self.device, self.autocast
        )
