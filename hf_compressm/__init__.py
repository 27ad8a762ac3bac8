"""State space models that shrink while they train, for the Hugging Face ecosystem."""

import logging as _logging

from .analysis import Analysis, analyze
from .compression import accept_other_sizes, compress, hankel_singular_values
from .config import CompressionConfig
from .fast_scans import use_fast_scans
from .models import (
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
)
from .param_groups import ssm_param_groups
from .reducers import register_reducer
from .report import CompressionReport
from .surgery import UnsupportedSetupError
from .training import CompreSSMCallback, reduce_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "CompreSSMCallback",
    "CompressionConfig",
    "CompressionReport",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "ReducibleMamba2Config",
    "ReducibleMamba2ForCausalLM",
    "ReducibleMambaConfig",
    "ReducibleMambaForCausalLM",
    "UnsupportedSetupError",
    "accept_other_sizes",
    "analyze",
    "compress",
    "hankel_singular_values",
    "reduce_checkpoint",
    "register_reducer",
    "ssm_param_groups",
    "use_fast_scans",
]

# As transformers does: reductions are seen without any set-up by the user, who may still set another level or handler.
_logger = _logging.getLogger(__name__)
if not _logger.handlers:
    _handler = _logging.StreamHandler()
    _handler.setFormatter(_logging.Formatter("[%(name)s] %(message)s"))
    _logger.addHandler(_handler)
    _logger.setLevel(_logging.INFO)
