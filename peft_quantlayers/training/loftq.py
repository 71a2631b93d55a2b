"""LoftQ: adapters initialised from the quantization error, which needs the float weights of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_flag, check_integer, check_model, nearest
from ..integrations.checkpoint_headers import CheckpointFiles
from ..integrations.checkpoint_names import CheckpointNames
from ..layers import QuantizedLinear
from ..layers.quantize_weight import quantize_weight
from ..lora import LoraQuantizedLinear
from ..lora.base_fingerprint import record_again
from ..transforms.record import in_words, transforms_in, transforms_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoftQResult:
    """What :func:`initialize_loftq` did to one layer.

    Fields:
        name: of the quantized layer.
        error_before, error_after: norm of ``W - (Q + scaling * B @ A)`` over that of the float weight ``W``, where
            ``Q`` is the dequantized weight.
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
    progress: bool = True,
) -> tuple[LoftQResult, ...]:
    """Initialise an adapter from the quantization error of its layers instead of zero.

    ``A`` and ``B`` of each quantized layer become the best approximation of ``W - Q`` by a matrix of their rank.
    Each iteration after the first quantizes ``W - scaling * B @ A`` again before that, in the layer's own format. A
    layer keeps the state with the lowest error, its initial state included.

    With one iteration the codes do not change, and only the adapter must be saved. With more **the base model
    changes too, and the adapter fits no other**: save both, the base after ``peft_model.unload()``. New codes are
    chosen without calibration data: on a calibrated model use one iteration.

    Call it before the training: it overwrites the adapter. PEFT's own ``LoraConfig(init_lora_weights="loftq")`` needs
    a float layer, and fits the adapter to the error of a bitsandbytes format, whatever the model is quantized to
    afterwards.

    Args:
        peft_model: a PEFT model, or a transformers model with adapters, on quantized layers.
        float_model: the model before quantization, a folder with its safetensors files, or its name on the hub.
            Modules are found by name; from files only the needed tensors are read.
        adapter: name of the adapter. Plain LoRA or rsLoRA.
        iterations: how often the adapter is fitted.
        progress: show a progress bar.

    Returns:
        One result for each quantized layer with the adapter.

    Raises:
        TypeError: an argument of another kind. Nothing is changed.
        ValueError: ``iterations`` below 1; no such adapter on a quantized layer; one is merged, merge-aware, of a rank
            above its layer's, or shares its layer with others while codes would change; ``float_model`` is not
            found, lacks a weight, is quantized, holds NaN or Inf, has other transforms, or is another model. Nothing
            is changed.
        NotImplementedError: the adapter is more than plain LoRA. Nothing is changed.

    Source: Li et al. 2023, "LoftQ". There, and in PEFT, ``scaling`` is assumed to be 1.
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
        found = sorted({name for layer in lora_layers for name in layer.lora_A})
        hint = f"those on quantized layers are {found}" if found else "it has none, and is the first argument"
        raise ValueError(
            f"adapter {adapter!r} is on no quantized layer of the model{nearest(adapter, found)}: {hint}. Nothing was "
            "changed."
        )
    for name, layer in layers.items():
        _check(name, layer, adapter, changes_codes=iterations > 1)
    _refuse_other_transforms(float_model, model)
    weight_of = _float_weights(float_model, model, list(layers))
    undo: list[Callable[[], None]] = []
    results = []
    try:
        for name, layer in tqdm(layers.items(), desc="LoftQ", disable=not progress):
            undo.append(_undo(layer, adapter))
            results.append(_initialize(name, layer, adapter, weight_of(name), iterations))
    except BaseException:
        for put_back in undo:
            put_back()
        raise
    n_new = sum(result.has_new_codes for result in results)
    if n_new:
        record_again(model, cast(Any, peft_model).peft_config, adapter)
        logger.warning(
            "%d of %d layers have new codes: save the base model too, after unload(). The adapter fits no other.",
            n_new,
            len(results),
        )
    return tuple(results)


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


def _initialize(name: str, layer: LoraQuantizedLinear, adapter: str, weight: Tensor, iterations: int) -> LoftQResult:
    base = layer.quantized_base()
    A, B = (cast(nn.Linear, part[adapter]).weight for part in (layer.lora_A, layer.lora_B))
    target = _checked(name, base, weight.to(base.codes.device, torch.float32))
    scaling = layer.scaling[adapter]
    norm = float(target.norm()) or 1.0

    def delta() -> Tensor:
        return scaling * (B.float() @ A.float())

    old = quantized = base.quantized_weight
    lost = target - base.method.dequantize(old)
    before = least = float((lost - delta()).norm()) / norm
    best = old, A.data, B.data
    if before >= 1:
        raise ValueError(
            f"{name}: the quantized weight is no nearer to that of float_model than zero is (error {before:.2f}): "
            "float_model is another model, or its layers have other names."
        )
    for iteration in range(iterations):
        if iteration:
            start = quantized if base.method.improves_start else None
            quantized = quantize_weight(target - delta(), quantized.spec, layer_name=name, start=start)
            lost = target - base.method.dequantize(quantized)
        left, right = _low_rank_approximation(lost / scaling, A.shape[0])
        A.data, B.data = right.to(A.dtype), left.to(B.dtype)
        found = float((lost - delta()).norm()) / norm
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


def _low_rank_approximation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of a tall and a wide factor that is nearest to ``matrix``.

    By the eigenvectors of the smaller Gram matrix, which takes at most half the time of a singular value
    decomposition.

    Returns:
        (out_features, rank) and (rank, in_features), of equal norms.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = _low_rank_approximation(matrix.t(), rank)
        return right.t().contiguous(), left.t().contiguous()
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    left = vectors[:, -rank:]
    right = left.t() @ matrix
    root = right.norm(dim=1).sqrt()  # of the singular values
    return left * root, right / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]


def _float_weights(float_model: nn.Module | str | Path, model: nn.Module, names: list[str]) -> Callable[[str], Tensor]:
    """Reads the float weight of a layer by its name; all ``names`` are there."""
    if isinstance(float_model, nn.Module):
        modules = dict(float_model.named_modules())
        _refuse_missing([name for name in names if not hasattr(modules.get(name), "weight")], names)
        quantized = [name for name in names if isinstance(modules[name], (QuantizedLinear, LoraQuantizedLinear))]
        if quantized:
            raise ValueError(f"{quantized[0]}: float_model is quantized itself. Load it without quantizing it.")
        return lambda name: cast(Tensor, modules[name].weight).detach()
    folder = Path(float_model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(float_model), allow_patterns=["*.safetensors"]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"float_model={str(float_model)!r} is not a folder, and the hub did not give it: {error}"
            ) from None
    files = CheckpointFiles(str(file) for file in sorted(folder.glob("*.safetensors")))
    parameters = CheckpointNames(model, layers=names).parameters(files.headers)
    stored = {name.removesuffix(".weight"): key for key, name in parameters.items() if name.endswith(".weight")}
    _refuse_missing([name for name in names if name not in stored], names)

    return lambda name: files.read(stored[name])


def _refuse_other_transforms(float_model: nn.Module | str | Path, model: nn.Module) -> None:
    """Raise ValueError if ``model`` had other transforms before it was quantized than ``float_model`` has.

    Scaled weights differ too little from others to be told from quantization errors.
    """
    is_here = isinstance(float_model, nn.Module)
    of_float = transforms_of(float_model) if is_here else transforms_in(Path(float_model))
    if of_float != transforms_of(model):
        raise ValueError(
            f"float_model has other transforms ({in_words(of_float)}) than the model before it was quantized "
            f"({in_words(transforms_of(model))}): its weights are others. Give the float model as transform_model "
            "left it. Nothing was changed."
        )


def _refuse_missing(missing: list[str], names: list[str]) -> None:
    if missing:
        raise ValueError(
            f"float_model has no weight for {len(missing)} of {len(names)} layers, for example {missing[0]!r}. Give "
            "the model that was quantized; where its files name the layers otherwise, load it and give the model."
        )
