"""Views: what of a batch an objective gets to see."""

from fasttrain.views.adversarial import Adversarial, adversarial
from fasttrain.views.structured import Structured, reverse_gradient, structured
from fasttrain.views.terms import ViewConfig, ViewedTermConfig, build_view
from fasttrain.views.view import View, clean

__all__ = [
    "Adversarial",
    "Structured",
    "View",
    "ViewConfig",
    "ViewedTermConfig",
    "adversarial",
    "build_view",
    "clean",
    "reverse_gradient",
    "structured",
]
