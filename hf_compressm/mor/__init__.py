"""Model order reduction of linear systems: pure PyTorch mathematics in float64 that knows nothing of models."""

from .balancing import Balancing, balance, error_bound, truncate
from .diagonal import DiagonalBalancing, DiagonalReduction, Realization, reduce_diagonal, states_for_order
from .gramians import complex_gramians, gramians, h2_error, h2_norm, real_gramians
from .instantaneous import (
    SSDSignals,
    apply_map,
    balanced_maps,
    instantaneous_sums,
    refined_maps,
    select_states,
    ssd_states,
    ssd_token_moments,
)
from .rank import (
    RANK_RULES,
    EnergyTolerance,
    RankRule,
    ReductionFraction,
    RelativeError,
    Spectrum,
    TargetStateSize,
    apply_constraints,
)
from .refit import TokenMoments, centred_refit
from .selective import (
    SelectiveCalibration,
    SelectiveReduction,
    SelectiveSignals,
    adjoint_gramian,
    reduce_selective,
    state_gramian,
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
    "RelativeError",
    "SSDSignals",
    "SelectiveCalibration",
    "SelectiveReduction",
    "SelectiveSignals",
    "Spectrum",
    "StateSpace",
    "TargetStateSize",
    "TokenMoments",
    "adjoint_gramian",
    "apply_constraints",
    "apply_map",
    "balance",
    "balanced_maps",
    "centred_refit",
    "complex_gramians",
    "error_bound",
    "float64_device",
    "gramians",
    "h2_error",
    "h2_norm",
    "instantaneous_sums",
    "promote",
    "real_embedding",
    "real_gramians",
    "reduce_diagonal",
    "reduce_selective",
    "refined_maps",
    "select_states",
    "ssd_states",
    "ssd_token_moments",
    "state_gramian",
    "states_for_order",
    "truncate",
]
