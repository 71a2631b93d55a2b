"""Scale-only finetuning: as a PEFT method, and as one call that tunes a model to predict what another does."""

from .predictions import Predictions, record_predictions
from .scales_config import QuantScalesConfig
from .tune_scales import TuningResult, tune_scales
from .tuned_layers import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm

__all__ = [
    "Predictions",
    "QuantScalesConfig",
    "QuantScalesLayer",
    "QuantScalesLinear",
    "QuantScalesNorm",
    "TuningResult",
    "record_predictions",
    "tune_scales",
]
