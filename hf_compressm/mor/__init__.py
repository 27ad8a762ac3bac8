"""Model order reduction of linear systems: pure PyTorch mathematics in float64 that knows nothing of models."""

from .balancing import Balancing, balance, error_bound, truncate
from .diagonal import DiagonalBalancing, DiagonalReduction, Realization, reduce_diagonal, states_for_order
from .gramians import complex_gramians, gramians, h2_error, h2_norm, real_gramians
from .rank import (
    RANK_RULES,
    EnergyTolerance,
    RankRule,
    ReductionFraction,
    Spectrum,
    TargetStateSize,
    apply_constraints,
)
from .systems import DiagonalSystem, IllConditioned, StateSpace, float64_device, promote, real_embedding

__all__ = [
    "RANK_RULES",
    "Balancing",
    "DiagonalBalancing",
    "DiagonalReduction",
    "DiagonalSystem",
    "EnergyTolerance",
    "IllConditioned",
    "RankRule",
    "Realization",
    "ReductionFraction",
    "Spectrum",
    "StateSpace",
    "TargetStateSize",
    "apply_constraints",
    "balance",
    "complex_gramians",
    "error_bound",
    "float64_device",
    "gramians",
    "h2_error",
    "h2_norm",
    "promote",
    "real_embedding",
    "real_gramians",
    "reduce_diagonal",
    "states_for_order",
    "truncate",
]
