"""Objectives: pure functions (encoded views, batch) -> a scalar, or one loss an image; and what wraps them."""

from fasttrain.objectives.cross_entropy import cross_entropy, cross_entropy_one_sided
from fasttrain.objectives.fare import FareConfig, Reference, fare, fare_one_sided, surrogate_one_sided
from fasttrain.objectives.gradient_penalty import gradient_penalty, layer_by_layer_penalty
from fasttrain.objectives.layers import layer_by_layer
from fasttrain.objectives.nt_xent import NTXentConfig, nt_xent
from fasttrain.objectives.objective import Objective, OneSided, Traits, encode, traits
from fasttrain.objectives.simsiam import simsiam, simsiam_one_sided
from fasttrain.objectives.sup_con import info_nce, sup_con, sup_con_one_sided
from fasttrain.objectives.terms import (
    LayersConfig,
    PenaltyConfig,
    TermConfig,
    build_objective,
    build_one_sided,
    check_term,
    sees_both,
)
from fasttrain.objectives.trades import trades, trades_one_sided

__all__ = [
    "FareConfig",
    "LayersConfig",
    "NTXentConfig",
    "Objective",
    "OneSided",
    "PenaltyConfig",
    "Reference",
    "TermConfig",
    "Traits",
    "build_objective",
    "build_one_sided",
    "check_term",
    "cross_entropy",
    "cross_entropy_one_sided",
    "encode",
    "fare",
    "fare_one_sided",
    "gradient_penalty",
    "info_nce",
    "layer_by_layer",
    "layer_by_layer_penalty",
    "nt_xent",
    "sees_both",
    "simsiam",
    "simsiam_one_sided",
    "sup_con",
    "sup_con_one_sided",
    "surrogate_one_sided",
    "trades",
    "trades_one_sided",
    "traits",
]
