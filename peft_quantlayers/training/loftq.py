"""LoftQ: adapters initialised from the quantization error, which needs the float weights of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_flag, check_integer, check_model, nearest
from ..calibration import Calibration, InputGroup, Visitor, walk
from ..layers import QuantizedLinear
from ..layers.quantize_weight import quantize_weight
from ..lora import LoraQuantizedLinear
from ..lora.base_fingerprint import record_again
from ..methods import get_method
from ..scales import Predictions
from ..transforms.applied_transforms import in_words, transforms_of
from .float_weights import float_weights
from .low_rank_approximation import low_rank_approximation, output_norm
from .tune_adapter import check_tuning, teacher_of, tune_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoftQResult:
    """What :func:`initialize_loftq` did to one layer.

    Fields:
        name: of the quantized layer.
        error_before, error_after: norm of ``W - (Q + scaling * B @ A)`` over that of the float weight ``W``, where
            ``Q`` is the dequantized weight. With calibration, that of the outputs.
        has_new_codes: whether ``Q`` has changed.
    """

    name: str
    error_before: float
    error_after: float
    has_new_codes: bool


@torch.no_grad()
def initialize_loftq(
    peft_model: nn.Module,
    float_model: nn.Module | str | Path,
    *,
    adapter: str = "default",
    iterations: int = 1,
    calibration: Any = None,
    tokenizer: Any = None,
    tune_epochs: int = 0,
    learning_rate: float = 1e-3,
    teacher: Predictions | str | Path | None = None,
    progress: bool = True,
) -> tuple[LoftQResult, ...]:
    """Initialise an adapter from the quantization error of its layers instead of zero.

    ``A`` and ``B`` of each quantized layer become the best approximation of ``W - Q`` by a matrix of their rank.
    Each iteration after the first quantizes ``W - scaling * B @ A`` again before that, in the layer's own format. A
    layer keeps the state with the lowest error, its initial state included.

    With ``calibration`` it is the outputs on this data that are approximated, block by block, with the adapter in the
    blocks before. On a base that was calibrated with asymmetric targets little is left for it.

    With ``tune_epochs`` the adapter is then trained, all layers together, until the model predicts what the float
    model does. Layers that make up for each other's errors are found by no approximation of single ones, so this is of
    most use with two bits.

    With one iteration the codes do not change, and only the adapter must be saved. With more **the base model
    changes too, and the adapter fits no other**: save both, the base after ``peft_model.unload()``. New codes are
    chosen with ``calibration`` too, or without if there is none: on a calibrated model use one iteration then.

    Call it before the training: it overwrites the adapter. PEFT's own ``LoraConfig(init_lora_weights="loftq")`` needs
    a float layer, and fits the adapter to the error of a bitsandbytes format, whatever the model is quantized to
    afterwards.

    Args:
        peft_model: a PEFT model, or a transformers model with adapters, on quantized layers.
        float_model: the model before quantization, a folder with its safetensors files, or its name on the hub.
            Modules are found by name; from files only the needed tensors are read.
        adapter: name of the adapter. Plain LoRA or rsLoRA.
        iterations: how often the adapter is fitted.
        calibration: as in :func:`quantize_model`. Layers that it does not reach are as without.
        tokenizer: for texts; None for the model's own.
        tune_epochs: epochs over the data, a window a step, in which ``A`` and ``B`` are trained; 0 for none. Every
            eighth window is left out; if the divergence there did not fall, the adapter stays as it was before them.
        learning_rate: of that training, relative to the root mean square of each matrix.
        teacher: what the float model predicts (:func:`record_predictions`), or its file, with the data that it was
            made on; None for ``float_model``, in memory, on ``calibration``.
        progress: show a progress bar.

    Returns:
        One result for each quantized layer with the adapter; errors are those before ``tune_epochs``.

    Raises:
        TypeError: an argument of another kind. Nothing is changed.
        ValueError: ``iterations`` below 1; no such adapter on a quantized layer; one is merged, merge-aware, of a rank
            above its layer's, not the active one with ``tune_epochs``, or shares its layer with others while codes
            would change; nothing to tune to; ``float_model`` is not found, lacks a weight, is quantized, holds NaN or
            Inf, has other transforms, or is another model. Nothing is changed.
        NotImplementedError: the adapter is more than plain LoRA. Nothing is changed.

    Source: Li et al. 2023, "LoftQ". There, and in PEFT, ``scaling`` is assumed to be 1. For ``calibration`` see
    :func:`low_rank.low_rank_approximation`.
    """
    check_model("initialize_loftq", peft_model)
    check_integer("iterations", iterations, at_least=1, at_most=10_000)
    check_flag("progress", progress)
    if not isinstance(adapter, str):
        raise TypeError(f"adapter must be the name of one adapter, got {adapter!r}; write adapter='default'.")
    if not isinstance(float_model, (nn.Module, str, Path)):
        raise TypeError(
            f"float_model must be the model before quantization, its folder or its name on the hub, got "
            f"{type(float_model).__name__}."
        )
    model = peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraQuantizedLinear) and adapter in module.lora_A
    }
    if not layers:
        lora_layers = (module for module in model.modules() if isinstance(module, LoraQuantizedLinear))
        present = sorted({name for layer in lora_layers for name in layer.lora_A})
        hint = f"those on quantized layers are {present}" if present else "it has none, and is the first argument"
        raise ValueError(
            f"adapter {adapter!r} is on no quantized layer of the model{nearest(adapter, present)}: {hint}. Nothing "
            "was changed."
        )
    for name, layer in layers.items():
        _check(name, layer, adapter, changes_codes=iterations > 1)
    check_tuning(layers, adapter, float_model, teacher, calibration, epochs=tune_epochs, learning_rate=learning_rate)
    _refuse_other_transforms(float_model, model)
    given = None if calibration is None else Calibration.of(calibration, tokenizer)
    if given is not None:
        _check_calibration(given, layers, changes_codes=iterations > 1)
    predictions = teacher_of(float_model, teacher, given, progress=progress) if tune_epochs else None
    weight_of = float_weights(float_model, model, list(layers))
    undo: list[Callable[[], None]] = []
    found: dict[str, LoftQResult] = {}

    def initialize(name: str, hessian: Tensor | None) -> None:
        undo.append(_undo(layers[name], adapter))
        found[name] = _initialize(name, layers[name], adapter, weight_of(name), iterations, hessian)

    try:
        if given is None:
            for name in tqdm(layers, desc="LoftQ", disable=not progress):
                initialize(name, None)
        else:
            walk(model, list(layers), given, _InitializingVisitor(given, initialize), progress=progress)
        if predictions is not None:
            tune_adapter(
                model,
                layers,
                adapter,
                predictions,
                epochs=tune_epochs,
                learning_rate=learning_rate,
                progress=progress,
            )
    except BaseException:
        for put_back in undo:
            put_back()
        raise
    results = [found[name] for name in layers]
    n_new = sum(result.has_new_codes for result in results)
    if n_new:
        record_again(model, cast(Any, peft_model).peft_config, adapter)
        logger.warning(
            "%d of %d layers have new codes: save the base model too, after unload(). The adapter fits no other.",
            n_new,
            len(results),
        )
    return tuple(results)


class _InitializingVisitor(Visitor):
    """Initialises each layer with the second moment of its inputs, as the adapters before it make them."""

    statistics = ("second_moment",)

    def __init__(self, calibration: Calibration, initialize: Callable[[str, Tensor | None], None]) -> None:
        self.calibration, self.initialize = calibration, initialize

    def visit_group(self, group: InputGroup) -> None:
        hessian = group.hessian(self.calibration)
        for name in group.names:
            self.initialize(name, hessian)


def _check_calibration(
    calibration: Calibration, layers: Mapping[str, LoraQuantizedLinear], *, changes_codes: bool
) -> None:
    """Raise ValueError for options that have no meaning here, or new codes that cannot be calibrated."""
    if calibration.finetune_epochs or calibration.asymmetric_targets or calibration.resume_folder is not None:
        raise ValueError(
            "initialize_loftq makes no use of finetune_epochs, asymmetric_targets and resume_folder; leave them out "
            "of the Calibration. Nothing was changed."
        )
    for name, layer in layers.items():
        spec = layer.quantized_base().spec
        if changes_codes and not get_method(spec.method).can_use_hessian(spec):
            raise ValueError(
                f"{name}: {get_method(spec.method).calibration_requirement} Use iterations=1, or leave calibration "
                "out. Nothing was changed."
            )


def _check(name: str, layer: LoraQuantizedLinear, adapter: str, *, changes_codes: bool) -> None:
    others = sorted(set(layer.lora_A) - {adapter})
    if layer.merged:
        raise ValueError(f"{name}: {layer.merged_adapters} are merged. Call unmerge_adapter() first.")
    if not isinstance(layer.get_base_layer(), QuantizedLinear):
        raise ValueError(f"{name}: the layer was dequantized, so it has no quantization error for LoftQ to fit.")
    if adapter in layer.lora_variant:
        raise NotImplementedError(
            f"{name}: adapter {adapter!r} is more than plain LoRA: its delta is not a product of two matrices. Use "
            "plain LoRA or rsLoRA."
        )
    rank, base = layer.r[adapter], layer.quantized_base()
    if rank > min(base.in_features, base.out_features):
        raise ValueError(f"{name}: rank {rank} is more than the weight has. Lower it with rank_pattern.")
    if adapter in layer.aware_adapters:
        raise ValueError(
            f"{name}: adapter {adapter!r} is merge-aware already. Call initialize_loftq first, and then "
            "enable_merge_aware."
        )
    if changes_codes and others:
        raise ValueError(
            f"{name}: iterations above 1 change the codes under the adapters {others} too. Use iterations=1, or add "
            "those adapters later."
        )


def _undo(layer: LoraQuantizedLinear, adapter: str) -> Callable[[], None]:
    state = layer.snapshot()
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    old_A, old_B = A.data, B.data

    def put_back() -> None:
        layer.restore(state)
        A.data, B.data = old_A, old_B

    return put_back


def _initialize(
    name: str, layer: LoraQuantizedLinear, adapter: str, weight: Tensor, iterations: int, hessian: Tensor | None
) -> LoftQResult:
    base = layer.quantized_base()
    A, B = (cast(nn.Linear, part[adapter]).weight for part in (layer.lora_A, layer.lora_B))
    target = _checked(name, base, weight.to(base.codes.device, torch.float32))
    scaling = layer.scaling[adapter]
    hessian = None if hessian is None else hessian.to(target.device)
    norm = output_norm(target, hessian) or 1.0

    def delta() -> Tensor:
        return scaling * (B.float() @ A.float())

    old = quantized = base.quantized_weight
    lost = target - base.method.dequantize(old)
    before = least = output_norm(lost - delta(), hessian) / norm
    best = old, A.data, B.data
    if before >= 1:
        raise ValueError(
            f"{name}: the quantized weight is no nearer to that of float_model than zero is (error {before:.2f}): "
            "float_model is another model, or its layers have other names."
        )
    for iteration in range(iterations):
        if iteration:
            start = quantized if base.method.improves_start else None
            quantized = quantize_weight(
                target - delta(), quantized.spec, layer_name=name, hessian=hessian, start=start
            )
            lost = target - base.method.dequantize(quantized)
        left, right = low_rank_approximation(lost / scaling, A.shape[0], hessian=hessian)
        A.data, B.data = right.to(A.dtype), left.to(B.dtype)
        found = output_norm(lost - delta(), hessian) / norm
        if found < least:
            best, least = (quantized, A.data, B.data), found
    if best[0] is not old:
        base.quantized_weight = best[0]
    A.data, B.data = best[1:]
    return LoftQResult(name=name, error_before=before, error_after=least, has_new_codes=best[0] is not old)


def _checked(name: str, base: QuantizedLinear, weight: Tensor) -> Tensor:
    """The target of codes and adapter together, (out_features, in_features), float32."""
    weight = weight.t() if base.is_conv1d else weight
    shape = (base.out_features, base.in_features)
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: the float weight has shape {tuple(weight.shape)}, the quantized one {shape}.")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the float weight holds NaN or Inf.")
    return weight if base.branch is None else weight - base.branch.dense()


def _refuse_other_transforms(float_model: nn.Module | str | Path, model: nn.Module) -> None:
    """Raise ValueError if ``model`` had other transforms before it was quantized than ``float_model`` has.

    Scaled weights differ too little from others to be told from quantization errors.
    """
    of_float = transforms_of(float_model)
    if of_float != transforms_of(model):
        raise ValueError(
            f"float_model has other transforms ({in_words(of_float)}) than the model before it was quantized "
            f"({in_words(transforms_of(model))}): its weights are others. Give the float model as transform_model "
            "left it. Nothing was changed."
        )
