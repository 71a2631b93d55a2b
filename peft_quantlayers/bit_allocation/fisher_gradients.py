"""What a change of a layer's outputs does to a model's predictions: one backward pass with targets of the model's own.

The KL divergence of the predictions after a small change ``e`` of a layer's outputs is half the mean of ``(g . e)^2``,
where ``g`` is the gradient of the log-likelihood of targets that are drawn from the model itself (the Fisher
information). Changes of several layers add up as far as they are independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call, evaluating, frozen, input_of, real_logits
from ..storage.free_memory import return_free_memory

# Tokens of a layer whose inputs and gradients are kept.
KEPT_TOKENS = 1024


@dataclass(eq=False)
class LayerSamples:
    """Inputs (n, in_features) of a layer and gradients (n, out_features) of its outputs for the same tokens.

    In bfloat16, since those of all layers are in memory at once: a mean over a thousand tokens loses nothing by it.
    """

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def divergence(self, delta: Tensor, rows: slice) -> float:
        """Nats of KL for each token if ``delta`` (n_rows, in_features), float32, is added to the weight's ``rows``.

        That of all rows is estimated from these: errors of different rows are taken to be independent.
        """
        inputs, gradients = torch.cat(self.inputs).float(), torch.cat(self.gradients).float()
        moved = (gradients[:, rows] * (inputs @ delta.to(inputs.device).t())).sum(1)
        return float(0.5 * moved.square().mean()) * gradients.shape[1] / len(delta)


def sampled_gradients(model: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> dict[str, LayerSamples]:
    """Samples of the layers ``names`` that the calls reach.

    Raises:
        TypeError: the model gives no logits, which predictions are made of.
    """
    found: dict[str, LayerSamples] = {}
    per_call = max(1, KEPT_TOKENS // len(calls))
    generator = torch.Generator().manual_seed(0)
    with frozen(model), evaluating(model), torch.enable_grad():
        for call in calls:
            with _sampled(model, names, call, per_call, found):
                logits = real_logits(
                    model,
                    call,
                    otherwise=": bits are planned by what a model predicts. Plan them for a model with a head, such "
                    "as AutoModelForCausalLM. The model was not changed.",
                )
            log_probs = logits.float().log_softmax(-1).flatten(0, -2)
            targets = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
            log_probs.gather(1, targets.to(log_probs.device)).sum().backward()
            del logits, log_probs, targets
            return_free_memory()
    return found


@contextmanager
def _sampled(
    model: nn.Module, names: Sequence[str], call: Call, n_kept: int, found: dict[str, LayerSamples]
) -> Iterator[None]:
    """Each layer that is called while this is open leaves samples in ``found`` once a gradient arrives at its outputs.

    Only those of ``n_kept`` tokens are kept: the whole gradients of all layers would be as large as their outputs.
    """

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x = input_of(args, kwargs).detach()
            numbers = torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)
            chosen = call.real_tokens(numbers).flatten()
            chosen = chosen[torch.linspace(0, len(chosen) - 1, min(n_kept, len(chosen))).long()]
            inputs = x.reshape(-1, x.shape[-1])[chosen].bfloat16()

            def arrived(gradient: Tensor) -> None:
                samples = found.setdefault(name, LayerSamples())
                samples.inputs.append(inputs)
                samples.gradients.append(gradient.reshape(-1, gradient.shape[-1])[chosen].bfloat16())

            wants_gradient = output + output.new_zeros(()).requires_grad_()
            wants_gradient.register_hook(arrived)
            return wants_gradient

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
