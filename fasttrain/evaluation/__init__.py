"""Evaluations: what encoders are shown to be, each a function to a named result, the same on every rank."""

from fasttrain.evaluation.features import Features, evaluation_mode, extract
from fasttrain.evaluation.knn import KNNAccuracy, KNNConfig, knn
from fasttrain.evaluation.linear import LinearAccuracy, LinearConfig, linear_probe

__all__ = [
    "Features",
    "KNNAccuracy",
    "KNNConfig",
    "LinearAccuracy",
    "LinearConfig",
    "evaluation_mode",
    "extract",
    "knn",
    "linear_probe",
]
