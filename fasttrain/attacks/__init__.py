"""Attacks: threat models, and functions (loss of each image, images) -> images that raise their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from fasttrain.attacks.apgd import apgd
from fasttrain.attacks.evaluation import Attack, PerImageLoss
from fasttrain.attacks.fgsm import fgsm
from fasttrain.attacks.noise import image_keys
from fasttrain.attacks.pgd import pgd
from fasttrain.attacks.plb import PLBConfig, plb
from fasttrain.attacks.threat import L2, Linf, Threat
from fasttrain.config import Config
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, Encoder
from fasttrain.models.folding import fold_batchnorm
from fasttrain_kernels.apgd import Norm

BatchNormMode = Literal["eval", "train"]


class AttackConfig(Config):
    name: Literal["fgsm", "pgd", "apgd"] = "apgd"
    """Attack: fgsm (one step), pgd, or apgd (step size and momentum adapt themselves)."""
    norm: Norm = "linf"
    """Norm that bounds the perturbation: linf or l2."""
    eps_255: float = pydantic.Field(default=8.0, ge=0)
    """Bound in 1/255 of the pixel range, for either norm: 8 is 8/255; an l2 bound of 0.5 is 127.5."""
    steps: int = pydantic.Field(default=10, ge=1)
    """Steps of pgd and apgd."""
    step_255: float | None = pydantic.Field(default=None, gt=0)
    """Step size of pgd in 1/255; null: 2.5 eps / steps."""
    restarts: int = pydantic.Field(default=1, ge=1)
    """Random starts of pgd and apgd; each image keeps the one of the highest loss."""
    random_start: bool = True
    """Whether pgd starts at a random point of the ball instead of at the image."""
    batchnorm: BatchNormMode = "eval"
    """BatchNorm during the attack: eval (running statistics, folded into the convolutions) or train (the batch's)."""

    users: ClassVar[dict[str, tuple[str, ...]]] = {
        "steps": ("pgd", "apgd"),
        "restarts": ("pgd", "apgd"),
        "step_255": ("pgd",),
        "random_start": ("pgd",),
    }
    "Settings that not every attack uses, and which do."

    @pydantic.model_validator(mode="after")
    def _nothing_unused(self) -> AttackConfig:
        for field, names in self.users.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default and self.name not in names:
                raise ValueError(f"{field}={value}: {self.name} does not use it; leave it out or set name={names[0]}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts={self.restarts} with random_start=false would all be one; set random_start=true"
            )
        if self.norm == "linf" and self.eps_255 > 255:
            raise ValueError(f"eps_255={self.eps_255}: an linf bound is at most 255, the whole pixel range")
        return self

    @property
    def starts_at_image(self) -> bool:
        """Whether the first step is taken at the image itself."""
        return self.name == "fgsm" or not self.random_start

    def doubts(self) -> list[str]:
        found, eps = [], f"{self.eps_255:g}"
        least, most = (1, 80) if self.norm == "linf" else (5, 50 * 255)
        if 0 < self.eps_255 < least:
            found.append(f"eps_255={eps} is {eps}/255: for {eps} of the range [0, 1] give {255 * self.eps_255:.4g}")
        elif self.norm == "l2" and 0 < self.eps_255 <= 16:
            found.append(
                f"eps_255={eps} bounds the l2 norm over all pixels by {self.eps_255 / 255:.2g}: 0.5 (127.5) is usual "
                "for CIFAR-10, 3 (765) for ImageNet; for a bound a value set norm=linf"
            )
        elif self.eps_255 > most:
            size = f"{self.eps_255 / 255:.4g}"
            found.append(
                f"eps_255={eps} moves each value by up to {size}: 8 (0.031) is usual; for an l2 bound set norm=l2"
                if self.norm == "linf"
                else f"eps_255={eps} is an l2 norm of {size}: 127.5 (0.5) is usual for CIFAR-10, 765 (3) for ImageNet"
            )
        if self.step_255 is not None and self.steps * self.step_255 < self.eps_255 / 2:
            found.append(
                f"step_255={self.step_255:g}: {self.steps} steps of {self.step_255:g}/255 do not reach the bound of "
                f"eps_255={self.eps_255:g}; null takes 2.5 eps / steps"
            )
        return found


def make_attack(config: AttackConfig) -> Attack:
    """The attack that ``config`` describes; its BatchNorm mode is for :func:`attacked`."""
    threat = (Linf if config.norm == "linf" else L2)(config.eps_255 / 255)
    if config.name == "fgsm":
        return fgsm(threat)
    if config.name == "apgd":
        return apgd(threat, config.steps, restarts=config.restarts)
    size = None if config.step_255 is None else config.step_255 / 255
    return pgd(threat, config.steps, size, restarts=config.restarts, random_start=config.random_start)


def attacked(encoder: Encoder, batchnorm: BatchNormMode = "eval") -> Callable[[Tensor], Encoded]:
    """What an attack should see of ``encoder``, as of now: images -> encodings.

    "eval": running statistics, folded into the convolutions, whatever mode the encoder is in; images do not see each
    other. "train": the encoder as it trains, with the statistics of the batch at hand (of all ranks, if synchronised).
    """
    if batchnorm == "eval":
        return fold_batchnorm(encoder)
    if not encoder.training:
        raise UsageError("batchnorm=train: the encoder is in evaluation mode; set batchnorm=eval")
    return encoder


__all__ = [
    "L2",
    "Attack",
    "AttackConfig",
    "Linf",
    "PLBConfig",
    "PerImageLoss",
    "Threat",
    "apgd",
    "attacked",
    "fgsm",
    "image_keys",
    "make_attack",
    "pgd",
    "plb",
]
