"""In-place changes of shape under a live training run: parameters, optimizer state, data-parallel replicas."""

from .averages import averages_of
from .optimizer import (
    GradientMap,
    adopt_parameters,
    carry_state,
    check_adoption,
    check_optimizer,
    drop_stale_state,
    release_parameters,
    reset_state,
    unwrap_optimizer,
)
from .parameters import resize_parameter_
from .preconditions import UnsupportedSetupError, check_model
from .replicas import Ranks, check_replicas_equal, find_replicas, rebuild_reducer
from .sharding import is_sharded, reshard, whole_parameters

__all__ = [
    "GradientMap",
    "Ranks",
    "UnsupportedSetupError",
    "adopt_parameters",
    "averages_of",
    "carry_state",
    "check_adoption",
    "check_model",
    "check_optimizer",
    "check_replicas_equal",
    "drop_stale_state",
    "find_replicas",
    "is_sharded",
    "rebuild_reducer",
    "release_parameters",
    "reset_state",
    "reshard",
    "resize_parameter_",
    "unwrap_optimizer",
    "whole_parameters",
]
