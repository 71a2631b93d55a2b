"""Which modules of a model are norm layers: the rest of what is continuous beside quantized layers."""

from torch import nn


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm layer with a weight: RMSNorm, LayerNorm and what models make of them.

    Model families bring norm classes of their own without a common base, so the class's name has to say it; its
    parameters must be vectors named weight and bias.
    """
    parameters = dict(module.named_parameters())
    return (
        "norm" in type(module).__name__.lower()
        and "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 and parameter.is_floating_point() for parameter in parameters.values())
    )
