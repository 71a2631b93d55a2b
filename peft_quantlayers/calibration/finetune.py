"""Train what is continuous in a quantized block until it gives the original block's outputs again."""

import torch
from torch import Tensor, nn

from ..layers import QuantizedLinear
from ..layers.norms import is_norm
from .blocks import Call
from .walk import BlockWork


@torch.enable_grad()
def finetune_block(
    work: BlockWork,
    *,
    epochs: int,
    learning_rate: float,
    layers: list[QuantizedLinear] | None = None,
    norms: bool = True,
) -> tuple[float, float]:
    """Lower the squared error of the block's outputs on its own calls; codes stay.

    Trained, by Adam with a cosine schedule: all floating tensors of ``layers``, by default all quantized ones of the
    block, in float32, and with ``norms`` their biases and the block's norm layers, as far as those are float32. Dense
    weights, routers and experts stay. A tensor's rate is ``learning_rate`` times its root mean square, since scales,
    zeros and codebooks differ in size by orders of magnitude. Ends where it began if the error did not fall, and also
    where it is interrupted.

    Returns:
        Error before and after, relative to the targets' energy.

    Raises:
        ValueError: the dtype of a layer's spec cannot hold what was trained; names the layer.

    Source: Egiazarian et al. 2024 (AQLM), section 3.3; the targets are those of the float model throughout, as in
    Chen et al. 2024 (EfficientQAT).
    """
    if work.targets is None:
        raise ValueError("block finetuning needs targets.")
    if layers is None:
        layers = [module for module in work.block.modules() if isinstance(module, QuantizedLinear)]
    parameters = _trainable(work.block, layers, norms=norms)
    required = {parameter: parameter.requires_grad for parameter in work.block.parameters()}
    for parameter in required:
        parameter.requires_grad_(False)
    kept = [parameter.detach().clone() for parameter in parameters]
    is_better = False
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        energy = sum(
            float(call.real_tokens(target).float().square().sum())
            for call, target in zip(work.calls, work.targets, strict=True)
        )
        first = _error(work, energy)
        _train(work, work.targets, parameters, energy=energy, epochs=epochs, learning_rate=learning_rate)
        last = _error(work, energy)
        if last < first:
            for layer in layers:
                _check_narrow(layer)
            is_better = True
    finally:
        if not is_better:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
        for parameter, was_required in required.items():
            parameter.grad = None
            parameter.requires_grad_(was_required)
        for layer in layers:
            _narrow(layer)
    return first, last if is_better else first


def _train(
    work: BlockWork,
    targets: list[Tensor],
    parameters: list[nn.Parameter],
    *,
    energy: float,
    epochs: int,
    learning_rate: float,
) -> None:
    groups = [
        {"params": [parameter], "lr": learning_rate * float(parameter.detach().square().mean().sqrt())}
        for parameter in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(work.calls))
    for _ in range(epochs):
        for call, target in zip(work.calls, targets, strict=True):
            loss = _difference(work, call, target).square().sum() / (energy / len(work.calls))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _difference(work: BlockWork, call: Call, target: Tensor) -> Tensor:
    """The output of the block for ``call`` less its target, float32; of padding tokens nothing."""
    output = call(work.block)
    return call.real_tokens(output.float() - target.to(output.device).float())


@torch.no_grad()
def _error(work: BlockWork, energy: float) -> float:
    targets: list[Tensor] = work.targets or []
    errors = [
        float(_difference(work, call, target).square().sum()) for call, target in zip(work.calls, targets, strict=True)
    ]
    return sum(errors) / max(energy, 1e-30)


def _trainable(block: nn.Module, layers: list[QuantizedLinear], *, norms: bool) -> list[nn.Parameter]:
    """Floating parameters to train, those of quantized layers widened to float32 in place."""
    metadata = []
    for layer in layers:
        for name in layer.quantized_weight.tensors:
            parameter = layer.get_parameter(name)
            if parameter.is_floating_point():  # codes and integer metadata stay
                parameter.data = parameter.data.float()
                metadata.append(parameter)
    if not norms:
        return metadata
    biases = [layer.bias for layer in layers if layer.bias is not None]
    norm_parameters = [p for module in block.modules() if is_norm(module) for p in module.parameters()]
    others = [parameter for parameter in biases + norm_parameters if parameter.dtype == torch.float32]
    return list(dict.fromkeys(metadata + others))


def _check_narrow(layer: QuantizedLinear) -> None:
    """ValueError where the dtypes of the layer's spec cannot hold its tensors."""
    for name, entry in layer.spec.tensor_layout(layer.out_features, layer.in_features).items():
        if entry.dtype.is_floating_point and not torch.isfinite(layer.get_parameter(name).data.to(entry.dtype)).all():
            raise ValueError(f"{layer.layer_name}: {entry.dtype} cannot hold the finetuned {name}. Use float32.")


def _narrow(layer: QuantizedLinear) -> None:
    """Back to the dtypes of the layer's spec."""
    for name, entry in layer.spec.tensor_layout(layer.out_features, layer.in_features).items():
        parameter = layer.get_parameter(name)
        parameter.data = parameter.data.to(entry.dtype)
