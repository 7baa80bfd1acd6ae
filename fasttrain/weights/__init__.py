"""Weights of anyone's: what a file is and holds (files.py), and the ResNet among it (layouts.py)."""

from fasttrain.weights.files import read
from fasttrain.weights.layouts import KNOWN, Found, encoder_in

__all__ = ["KNOWN", "Found", "encoder_in", "read"]
