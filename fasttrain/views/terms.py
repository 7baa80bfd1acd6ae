"""Settings of a term's view, and the view that they describe."""

from __future__ import annotations

from typing import Literal

import pydantic

from fasttrain.attacks import AttackConfig
from fasttrain.attacks.structured import StructuredConfig
from fasttrain.config import Config
from fasttrain.models import Encoder
from fasttrain.objectives import TermConfig, build_one_sided, sees_both
from fasttrain.views.adversarial import adversarial
from fasttrain.views.structured import structured
from fasttrain.views.view import View, clean


class ViewConfig(Config):
    """What of a batch a term gets to see."""

    kind: Literal["clean", "attack", "structured"] = "clean"
    """clean (as augmented), attack (one view attacked, the others fixed) or structured (one changed by an adversary
    that is trained along)."""
    index: int = pydantic.Field(default=0, ge=0, le=1)
    """attack, structured: which of the two views, 0 or 1."""
    attack: AttackConfig = AttackConfig()
    """The attack, on the term's objective without its penalty and layers."""
    structured: StructuredConfig = StructuredConfig()
    """The learned change."""

    @pydantic.model_validator(mode="after")
    def _nothing_unused(self) -> ViewConfig:
        users = {"index": ("attack", "structured"), "attack": ("attack",), "structured": ("structured",)}
        for field, kinds in users.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default and self.kind not in kinds:
                what = f"{field}={value}" if field == "index" else f"{field} is given"
                raise ValueError(f"{what}: view.kind={self.kind} does not use it; set view.kind={kinds[0]}")
        return self


class ViewedTermConfig(TermConfig):
    """One term of the loss, and the view of the batch that it is of."""

    view: ViewConfig = ViewConfig()
    """View of the batch."""

    @pydantic.model_validator(mode="after")
    def _view_fits(self) -> ViewedTermConfig:
        if self.view.kind == "structured" and self.penalised and self.penalty.method == "finite_difference":
            raise ValueError(
                "penalty.method=finite_difference cuts the penalty's gradient to the adversary of "
                "view.kind=structured: use penalty.method=double_backward"
            )
        if sees_both(self):
            self._attacked_at_random()
        return self

    def _attacked_at_random(self) -> None:
        view = self.view
        if view.kind != "attack":
            raise ValueError(
                f"objective={self.objective} compares each image with its attacked self and view.kind={view.kind}: set "
                "view.kind=attack"
            )
        if view.index:
            raise ValueError(f"view.index={view.index}: {self.objective} is of one view, set view.index=0")
        if view.attack.starts_at_image:
            raise ValueError(
                f"view.attack.name={view.attack.name} would start at the image, where clean and attacked predictions "
                "agree and their divergence has no gradient: use view.attack.name=apgd, or pgd with "
                "view.attack.random_start=true"
            )


def build_view(term: ViewedTermConfig, encoder: Encoder, seed: int, accumulation: int = 1) -> View:
    """The view that ``term`` describes, on the encoder's device; ``seed`` is that of an attack's random starts."""
    view, device = term.view, next(encoder.parameters()).device
    match view.kind:
        case "attack":
            against, beside = build_one_sided(term), sees_both(term)
            return adversarial(view.attack, against, seed, view.index, accumulation, beside).to(device)
        case "structured":
            return structured(view.structured, encoder.backbone.num_features, view.index).to(device)
    return clean


__all__ = ["ViewConfig", "ViewedTermConfig", "build_view"]
