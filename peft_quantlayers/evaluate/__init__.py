"""Measuring models: perplexity, divergence, routing of experts, capture of a merge, memory for the backward pass."""

from .capture import Capture, capture
from .divergence import Divergence, divergence
from .memory import saved_for_backward
from .perplexity import perplexity
from .routing import RoutingAgreement, routing_agreement

__all__ = [
    "Capture",
    "Divergence",
    "RoutingAgreement",
    "capture",
    "divergence",
    "perplexity",
    "routing_agreement",
    "saved_for_backward",
]
