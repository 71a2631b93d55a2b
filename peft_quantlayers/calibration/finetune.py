"""Train what is continuous in a quantized block until it gives the original block's outputs again."""

import torch
from torch import Tensor, nn

from ..layers import QuantizedLinear
from ..layers.norms import is_norm
from ..methods.any_threads import sum_of_all
from .blocks import Call
from .trained_metadata import TrainedMetadata, trained_metadata
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
    weights, routers and experts stay. A tensor's rate is ``learning_rate`` times its root mean square. Ends where it
    began if the error did not fall, and also where it is interrupted.

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
    with trained_metadata(work.block, layers, beside=_beside(work.block, layers) if norms else ()) as trained:
        energy = sum(
            float(sum_of_all(call.real_tokens(target).float().square()))
            for call, target in zip(work.calls, work.targets, strict=True)
        )
        first = _error(work, energy)
        _train(work, work.targets, trained, energy=energy, epochs=epochs, learning_rate=learning_rate)
        last = _error(work, energy)
        if last < first:
            trained.keep()
    return first, last if trained.is_kept else first


def _train(
    work: BlockWork,
    targets: list[Tensor],
    trained: TrainedMetadata,
    *,
    energy: float,
    epochs: int,
    learning_rate: float,
) -> None:
    optimizer = torch.optim.Adam(trained.rates(learning_rate), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(work.calls))
    for _ in range(epochs):
        for call, target in zip(work.calls, targets, strict=True):
            loss = sum_of_all(_difference(work, call, target).square()) / (energy / len(work.calls))
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
        float(sum_of_all(_difference(work, call, target).square()))
        for call, target in zip(work.calls, targets, strict=True)
    ]
    return sum(errors) / max(energy, 1e-30)


def _beside(block: nn.Module, layers: list[QuantizedLinear]) -> list[nn.Parameter]:
    """Biases of the layers and parameters of the block's norms, as far as they are float32."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    norm_parameters = [p for module in block.modules() if is_norm(module) for p in module.parameters()]
    return [parameter for parameter in biases + norm_parameters if parameter.dtype == torch.float32]
