"""Which modules of a model are norm layers."""

from torch import nn


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm layer with a weight: RMSNorm, LayerNorm or a variant of them.

    Model families define their own norm classes without a common base, so the class's name must contain "norm". Its
    parameters must be vectors named weight and bias.
    """
    parameters = dict(module.named_parameters())
    return (
        "norm" in type(module).__name__.lower()
        and "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in parameters.values())
    )
