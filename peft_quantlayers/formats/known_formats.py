"""All checkpoint formats, by name and in the order in which a writer chooses."""

from .checkpoint import QuantlayersFormat
from .checkpoint_format import CheckpointFormat, ModelDescription
from .published_aqlm import PublishedAqlmFormat
from .published_hqq import PublishedHqqFormat

# The first that can hold a model is written: published formats, which other packages read too, before our own.
_FORMATS: tuple[CheckpointFormat, ...] = (PublishedAqlmFormat(), PublishedHqqFormat(), QuantlayersFormat())


def known_formats() -> dict[str, CheckpointFormat]:
    """All formats by name."""
    return {checkpoint_format.name: checkpoint_format for checkpoint_format in _FORMATS}


def choose_format(description: ModelDescription) -> CheckpointFormat:
    """The format in which a model is written: the first that can hold ``description``.

    Raises:
        ValueError: no format can; gives the reason of each.
    """
    reasons = {checkpoint_format: checkpoint_format.can_hold(description) for checkpoint_format in _FORMATS}
    for checkpoint_format, reason in reasons.items():
        if reason is None:
            return checkpoint_format
    told = "\n  ".join(f"{checkpoint_format.name}: {reason}" for checkpoint_format, reason in reasons.items())
    raise ValueError(f"no checkpoint format can hold this model:\n  {told}")
