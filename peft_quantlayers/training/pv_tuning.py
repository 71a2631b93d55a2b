"""Full finetuning of AQLM models: codebooks and scales by AdamW, codes by steps along the gradient of the weight.

Here are the hooks, the buffers and the optimizer's interface; the choice of the codes is in
``methods/aqlm/code_moves.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantlayers_kernels.tiled import weight_gradient

from ..arguments import check_integer, check_model, check_number
from ..integrations.transformers_quantizer import QuantlayersHfQuantizer
from ..layers import AQLMLinear, quantized_modules
from ..methods import move_aqlm_codes


def check_values(
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    code_lr: float,
    max_code_change: float,
    trust_ratio: float,
    buffer_bytes: int,
) -> None:
    """Raise TypeError or ValueError for an argument of :class:`PVTuner` out of range, whatever the model is."""
    if code_lr != 0:
        check_number("code_lr", code_lr, above=0.0, at_most=1e6)
    check_number("max_code_change", max_code_change, above=0.0, at_most=1.0)
    check_number("trust_ratio", trust_ratio, above=0.0, at_most=1.0)
    if not isinstance(lr, Tensor) and lr != 0:
        check_number("lr", lr, above=0.0, at_most=1e6)
    check_integer("buffer_bytes", buffer_bytes, at_least=0, at_most=2**62)
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not is_pair or not all(isinstance(beta, float) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas!r} must be two numbers from 0 to below 1, for example (0.9, 0.95).")


def check_buffer(layers: Mapping[str, AQLMLinear], *, code_lr: float, buffer_bytes: int) -> None:
    """Raise ValueError where codes are trained and ``buffer_bytes`` do not hold the gradient of the largest layer."""
    largest = max(layers, key=lambda name: _gradient_bytes(layers[name]))
    if code_lr and buffer_bytes < _gradient_bytes(layers[largest]):
        raise ValueError(
            f"{largest}: the gradient of its weight takes {_gradient_bytes(layers[largest])} bytes and "
            f"buffer_bytes={buffer_bytes} allows less. Give it as much, or set code_lr=0."
        )


class PVTuner(torch.optim.AdamW):
    """An optimizer that trains all of an AQLM model's quantized layers, codes included.

    Each ``step`` first takes an AdamW step on codebooks and scales, and then gives new codes to the groups of weights
    with the largest gradient. Codes move along the gradient of the dense weight, which hooks collect during backward:
    for as many layers as fit into ``buffer_bytes``, and for the next ones in the next step. Gradients of several
    backward passes add up until ``step`` uses them or ``zero_grad`` discards them.

    Otherwise it is a plain optimizer: parameter groups (``add_param_group`` for norms or a head), schedulers,
    ``state_dict`` and ``Trainer(optimizers=(tuner, None))`` work as usual. The codes are part of the model, not of
    ``state_dict``.

    Source: Malinovskii et al. 2024, "PV-Tuning". There the codes follow Adam steps on a float copy of all weights.

    Attributes:
        changed_groups: number of groups that got new codes in the last step, by layer, for the layers of that step.
        peak_buffer_bytes: peak memory of the gradients of dense weights so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        code_lr: float = 0.3,
        max_code_change: float = 0.01,
        trust_ratio: float = 0.003,
        buffer_bytes: int = 1 << 30,
    ) -> None:
        """Widen codebooks and scales of all AQLM layers of ``model`` to float32, and make them trainable.

        Args:
            model: a model with AQLM layers, changed in place. Its other parameters are left as they are.
            lr, betas: of AdamW for codebooks and scales; there is no weight decay.
            code_lr: length of the step on the dense weight, along its gradient over the root of the factored second
                moment, relative to the weight: 0.3 is 30 % of its root mean square on average over all groups.
                0 trains codebooks and scales only.
            max_code_change: fraction of a layer's groups that may get new codes in one step.
            trust_ratio: bound on the change of a layer by one step's new codes, relative to its norm. All layers
                change at once, so a deep model diverges at a ratio that a small one tolerates. In a layer of a few
                hundred groups a single group is several percent of the norm, and needs a ratio above that.
            buffer_bytes: bytes for gradients of dense weights, float32. ``step`` also needs one layer's dense weight
                for a short time.

        Raises:
            TypeError: an argument of another kind; the model is left as it was.
            ValueError: no AQLM layer, a value out of range, or ``buffer_bytes`` too small for a layer; the model is
                left as it was.
        """
        check_model("PVTuner", model)
        layers = {name: layer for name, layer in quantized_modules(model).items() if isinstance(layer, AQLMLinear)}
        if not layers:
            raise ValueError(
                "the model has no AQLM layer. Quantize it first: "
                "peft_quantlayers.quantize_model(model, peft_quantlayers.AQLMConfig())."
            )
        check_values(
            lr=lr,
            betas=betas,
            code_lr=code_lr,
            max_code_change=max_code_change,
            trust_ratio=trust_ratio,
            buffer_bytes=buffer_bytes,
        )
        check_buffer(layers, code_lr=code_lr, buffer_bytes=buffer_bytes)
        self.model, self.layers = model, layers
        self.code_lr, self.max_code_change, self.trust_ratio = code_lr, max_code_change, trust_ratio
        self.buffer_bytes = buffer_bytes
        self.changed_groups: dict[str, int] = {}
        self.peak_buffer_bytes = 0
        self._gradients: dict[str, Tensor] = {}
        torch.optim.AdamW([torch.zeros(1)], lr=lr, betas=betas)  # raises before anything is changed
        for layer in layers.values():
            _widen(layer)
        self._set_trainable(True)
        parameters = [layer.get_parameter(name) for layer in layers.values() for name in ("codebooks", "scales")]
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=0.0)
        self.param_groups[0]["first_layer"] = 0  # of those whose codes have their turn; saved with the state
        self._turn = self._layers_from(0)
        self.register_load_state_dict_post_hook(lambda _: self._start_turn())
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._watch(name)) for name, layer in layers.items() if code_lr
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update codebooks and scales, then codes. Returns what ``closure`` returned, as any optimizer.

        Raises:
            ValueError: the gradient of a weight is not finite; names the layer, and nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, gradient in self._gradients.items():
            if not torch.isfinite(gradient).all():
                raise ValueError(
                    f"{name}: the gradient of its weight holds NaN or Inf; no code and no codebook was changed. Lower "
                    "lr or code_lr, or leave this batch out."
                )
        super().step()
        self.changed_groups = {name: self._move(name) for name in list(self._gradients)}
        if self.changed_groups:
            self.param_groups[0]["first_layer"] += len(self._turn)
            self._start_turn()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients, those of dense weights too."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

    def close(self) -> None:
        """End the training: freeze codebooks and scales, remove the hooks and free the buffers."""
        for handle in self._handles:
            handle.remove()
        self.zero_grad()
        self._set_trainable(False)

    def _set_trainable(self, is_trainable: bool) -> None:
        for layer in self.layers.values():
            for name in ("codebooks", "scales"):
                layer.get_parameter(name).requires_grad = is_trainable
        quantizer = getattr(self.model, "hf_quantizer", None)
        if isinstance(quantizer, QuantlayersHfQuantizer):
            quantizer.is_training_codes = is_trainable

    def _start_turn(self) -> None:
        group = self.param_groups[0]
        group["first_layer"] %= len(self.layers)
        self._turn = self._layers_from(group["first_layer"])

    def _layers_from(self, first: int) -> frozenset[str]:
        """Layers whose codes may move in one step: from the ``first`` on, around the end, as the buffers hold."""
        names = list(self.layers)
        turn, nbytes = [], 0
        for name in names[first:] + names[:first]:
            nbytes += _gradient_bytes(self.layers[name])
            if nbytes > self.buffer_bytes:
                break
            turn.append(name)
        return frozenset(turn)

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # With reentrant checkpointing the first forward has no gradient, and the one in backward has.
            if output.requires_grad and name in self._turn:
                x = inputs[0].detach()
                output.register_hook(lambda grad: self._collect(name, grad, x))

        return hook

    def _collect(self, name: str, grad: Tensor, x: Tensor) -> None:
        gradient = weight_gradient(grad, x).float()
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient
        held = sum(gradient.nbytes for gradient in self._gradients.values())
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, held)

    def _move(self, name: str) -> int:
        layer = self.layers[name]
        layer.quantized_weight, n_changed = move_aqlm_codes(
            layer.quantized_weight,
            self._gradients.pop(name),
            step=self.code_lr,
            max_change=self.max_code_change,
            trust_ratio=self.trust_ratio,
            is_scaled=True,
        )
        return n_changed


def _gradient_bytes(layer: AQLMLinear) -> int:
    return layer.out_features * layer.in_features * torch.float32.itemsize


def _widen(layer: AQLMLinear) -> None:
    """Give ``layer`` float32 codebooks and scales, of the same values."""
    old, spec = layer.quantized_weight, layer.spec.widened()
    layout = spec.tensor_layout(layer.out_features, layer.in_features)
    tensors = {name: tensor.to(layout[name].dtype) for name, tensor in old.tensors.items()}
    layer.quantized_weight = replace(old, spec=spec, tensors=tensors)
