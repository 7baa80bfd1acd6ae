"""Views: what of a batch an objective gets to see."""

from fasttrain.views.adversarial import Adversarial, adversarial
from fasttrain.views.view import View, clean

__all__ = ["Adversarial", "View", "adversarial", "clean"]
