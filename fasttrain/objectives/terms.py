"""Settings of a term of the loss, and the tables that turn its names into functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, NamedTuple

import pydantic

from fasttrain.config import Config, Where
from fasttrain.errors import UsageError
from fasttrain.models import ModelConfig
from fasttrain.objectives.cross_entropy import cross_entropy, cross_entropy_one_sided
from fasttrain.objectives.gradient_penalty import (
    Method,
    Precision,
    Scheme,
    gradient_penalty,
    layer_by_layer_penalty,
)
from fasttrain.objectives.layers import layer_by_layer
from fasttrain.objectives.nt_xent import nt_xent
from fasttrain.objectives.objective import Objective, OneSided
from fasttrain.objectives.simsiam import simsiam, simsiam_one_sided
from fasttrain.objectives.sup_con import info_nce, sup_con, sup_con_one_sided
from fasttrain.objectives.trades import trades, trades_one_sided

Weight = Annotated[float, pydantic.Field(ge=0)]
PerStage = tuple[Weight, Weight, Weight, Weight]


class _Entry(NamedTuple):
    objective: Callable[..., Objective]
    one_sided: Callable[..., OneSided]
    options: dict[str, float]  # keys of the term that it takes, and what null is for each
    needs: tuple[str, ...]  # keys of the model that must not be 0
    views: int  # of each image, at least
    images: int  # that a loss sees together, at least: with fewer it is constant, whatever the encoder does
    classes: int  # of the data set, at least, likewise
    sees_both: bool = False  # the one view of each image, and the attacked one beside it


OBJECTIVES: dict[str, _Entry] = {
    "nt_xent": _Entry(nt_xent, info_nce, {"temperature": 0.1}, ("head.layers",), 2, 2, 0),
    "sup_con": _Entry(sup_con, sup_con_one_sided, {"temperature": 0.1}, ("head.layers",), 2, 2, 2),
    "cross_entropy": _Entry(cross_entropy, cross_entropy_one_sided, {}, ("classes",), 1, 1, 2),
    "simsiam": _Entry(simsiam, simsiam_one_sided, {}, ("head.layers", "head.predictor"), 2, 2, 0),
    "trades": _Entry(trades, lambda beta: trades_one_sided(), {"beta": 6.0}, ("classes",), 1, 1, 2, sees_both=True),
}


OPTIONS = ("temperature", "beta")
"Keys of a term that some objectives take."


class PenaltyConfig(Config):
    """Tikhonov penalty on the gradient by the images; see :func:`gradient_penalty`."""

    weight: Weight = 0.0
    """λ of L + λ/2 R, the squared norm of the loss's gradient by the images; 0: no penalty."""
    method: Method = "double_backward"
    """double_backward (exact), or finite_difference: another regulariser, see its docstring for how far off."""
    step: float | None = pydantic.Field(default=None, gt=0)
    """finite_difference: L2 length an image is moved by, pixels in [0, 1]; null: 0.01."""
    scheme: Scheme | None = None
    """finite_difference: forward (one more pass) or central (two); null: forward."""
    precision: Precision = "autocast"
    """autocast as train.precision says, or fp32: bf16 is 8 % off where the penalty dominates."""

    @pydantic.model_validator(mode="after")
    def _steps_are_for_differences(self) -> PenaltyConfig:
        for key in ("step", "scheme"):
            if self.method != "finite_difference" and getattr(self, key) is not None:
                raise ValueError(f"{key}={getattr(self, key)} means nothing to {self.method}: remove it")
        return self

    def options(self) -> dict:
        """Keyword arguments of :func:`gradient_penalty` and :func:`layer_by_layer_penalty`."""
        given = {"step": self.step, "scheme": self.scheme}
        return {"method": self.method, "precision": self.precision} | {k: v for k, v in given.items() if v is not None}


class LayersConfig(Config):
    """Weights over the encoder's 4 stages; see :func:`layer_by_layer`."""

    alpha: PerStage | None = None
    """Weights of the loss at each of the 4 stages, growing; null: the encoder's output alone."""
    beta: PerStage | None = None
    """Weights of each stage's penalty, in place of penalty.weight/2; null: none."""

    @pydantic.model_validator(mode="after")
    def _penalties_have_losses(self) -> LayersConfig:
        if self.beta is not None and self.alpha is None:
            raise ValueError(
                f"beta={self.beta} without alpha: give the losses' weights too, alpha=[0, 0, 0, 1] for one"
            )
        for name, weights in (("alpha", self.alpha), ("beta", self.beta)):
            if weights is not None and not any(weights):
                raise ValueError(f"{name}={weights}: give at least one stage a weight, or leave {name} out")
        return self


class TermConfig(Config):
    """One term of the loss: weight · (objective, on one or all stages, with or without a penalty)."""

    objective: str = "nt_xent"
    """nt_xent, sup_con, cross_entropy, simsiam or trades."""
    weight: float = pydantic.Field(default=1.0, gt=0)
    """Factor on the term."""
    temperature: float | None = pydantic.Field(default=None, gt=0)
    """nt_xent, sup_con: temperature; null: 0.1."""
    beta: float | None = pydantic.Field(default=None, gt=0)
    """trades: weight of the divergence of clean and attacked predictions; null: 6."""
    penalty: PenaltyConfig = PenaltyConfig()
    """Penalty on the image gradient."""
    layers: LayersConfig = LayersConfig()
    """Losses and penalties layer by layer."""

    reads: ClassVar[dict[str, Where]] = {"penalty": Where("penalised", why="penalty.weight=0")}

    @property
    def penalised(self) -> bool:
        """Whether there is a penalty at all."""
        return bool(self.penalty.weight) or self.layers.beta is not None

    @pydantic.field_validator("objective")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name not in OBJECTIVES:
            raise ValueError(f"{name!r} does not exist: choose one of {', '.join(OBJECTIVES)}")
        return name

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> TermConfig:
        for key in OPTIONS:
            if getattr(self, key) is not None and key not in OBJECTIVES[self.objective].options:
                raise ValueError(f"{key}={getattr(self, key)}: {self.objective} has none, remove it")
        if self.layers.beta is not None and self.penalty.weight:
            raise ValueError(
                f"penalty.weight={self.penalty.weight} and layers.beta={self.layers.beta} both weigh the penalty: "
                "set penalty.weight=0"
            )
        try:
            build_objective(self)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


def build_objective(config: TermConfig) -> Objective:
    """The objective that ``config`` describes, its weight left to the caller.

    Raises:
        UsageError: a combination that the mathematics does not allow; see :func:`gradient_penalty`.
    """
    of = OBJECTIVES[config.objective].objective(*_options(config))
    alpha, beta, penalty = config.layers.alpha, config.layers.beta, config.penalty
    if beta is not None:
        return layer_by_layer_penalty(of, alpha, beta, **penalty.options())
    if alpha is not None:
        of = layer_by_layer(of, alpha)
    return gradient_penalty(of, penalty.weight, **penalty.options()) if penalty.weight else of


def build_one_sided(config: TermConfig) -> OneSided:
    """The loss by which an attack on one view, the others fixed, is to raise this term's objective."""
    return OBJECTIVES[config.objective].one_sided(*_options(config))


def sees_both(config: TermConfig) -> bool:
    """Whether this term's objective is of clean images and their attacked selves, views of one batch in this order."""
    return OBJECTIVES[config.objective].sees_both


def check_term(config: TermConfig, model: ModelConfig, views: int, classes: int, images: int) -> None:
    """Refuse at start a model without the heads that the term needs, too few views, a classifier of another size, and
    a loss that would be constant: a contrastive one of one image (SimSiam's too, whose BatchNorm makes any two rows
    +1 and -1), one by labels of one class.

    Args:
        views: of each image in a batch.
        classes: of the data set.
        images: that a loss sees together: of a micro-batch of all ranks, or with gradient caching of the whole batch.

    Raises:
        UsageError: naming the key to set.
    """
    entry = OBJECTIVES[config.objective]
    if classes < entry.classes:
        what = "1 class" if classes else "no labels"
        raise UsageError(
            f"{config.objective} tells classes apart and the images have {what}, so that it learns nothing of them: "
            "choose nt_xent or simsiam, or give images of more classes"
        )
    has = {"head.layers": model.head.layers, "head.predictor": model.head.predictor, "classes": model.classes}
    for key in entry.needs:
        if not has[key]:
            raise UsageError(f"model.{key}=0: {config.objective} needs it, set model.{key}")
    if config.layers.alpha is not None and not model.layer_heads:
        raise UsageError("model.layer_heads=false: layer-by-layer losses need them, set model.layer_heads=true")
    if views < entry.views:
        raise UsageError(f"augment.views={views}: {config.objective} compares views, set augment.views={entry.views}")
    if views > 1 and entry.sees_both:
        raise UsageError(
            f"augment.views={views}: {config.objective} compares an image with its attacked self, set augment.views=1"
        )
    if images < entry.images:
        raise UsageError(
            f"{config.objective} compares images and a micro-batch of all ranks has {images}, so that its loss is "
            "constant: raise train.batch or lower train.accumulation"
            + (" (or compare the whole batch by train.loss_over=batch)" if config.objective != "simsiam" else "")
        )
    if "classes" in entry.needs and model.classes != classes:
        raise UsageError(
            f"model.classes={model.classes}, but the images have {classes} classes: set model.classes={classes}"
        )


def _options(config: TermConfig) -> tuple[float, ...]:
    options = OBJECTIVES[config.objective].options
    return tuple(usual if getattr(config, key) is None else getattr(config, key) for key, usual in options.items())
