"""One tiny model through quantizing, saving, loading, a LoRA step and a merge; every difference and error in words.

Used by ``models_table.py`` for all classes, and by ``tests/models`` for a sample.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _tiny_models import first_float, tiny_inputs, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import peft_quantlayers as pql

# Groups of 32 fit most of the tiny layers; the others show what becomes of a misfit.
CONFIG = pql.HQQConfig(nbits=4, group_size=32, iters=2)
# Half precision shows which layers transformers keeps in float32.
DTYPE = torch.float16
MESSAGE_LENGTH = 240

# "" for a step that is right, the difference or the error otherwise; None for one that could not be tried.
STEPS = ("float", "in memory", "while loading", "saved and loaded", "LoRA step", "merge")


def journey(class_name: str, folder: Path, config: pql.QuantConfig = CONFIG) -> dict[str, Any]:
    """What becomes of a tiny model of one class, quantized by ``config``.

    Returns:
        One of ``STEPS`` each: ``"float"`` is transformers' own saving and loading, without which there is nothing to
        compare. ``inputs`` on which the outputs were compared, and :func:`shares`. ``build``, an error, if there is no
        such model.
    """
    try:
        model = tiny_model(class_name)
    except Exception as error:
        return {"build": short(error)}
    row: dict[str, Any] = dict.fromkeys(STEPS)
    model_type = type(model)

    def load(name: str, dtype: torch.dtype = DTYPE, **kwargs: Any) -> PreTrainedModel:
        return model_type.from_pretrained(folder / name, dtype=dtype, **kwargs).eval()

    def saved_float() -> str:
        model.save_pretrained(folder / "float")
        return different_states(model, load("float", torch.float32))

    row["float"] = told(saved_float)
    if row["float"]:
        return row
    quantized = load("float")
    inputs = tiny_inputs(quantized)
    row["inputs"] = None if inputs is None else "+".join(name for name in inputs if name != "use_cache")
    row["in memory"] = told(lambda: pql.quantize_model(quantized, config, progress=False) and "")
    if row["in memory"]:
        return row
    row |= shares(pql.summary(quantized))

    def saved() -> str:
        pql.save_model(quantized, folder / "quantized")
        return differences(quantized, load("quantized"), inputs)

    row["while loading"] = told(
        lambda: differences(quantized, load("float", quantization_config=config), inputs),
    )
    row["saved and loaded"] = told(saved)
    if inputs is None:
        return row
    targets = lora_targets(quantized)
    adapted: list[PeftModel] = []

    def trained(base: PreTrainedModel) -> str:
        adapted.append(get_peft_model(base, LoraConfig(r=4, target_modules=targets)))
        return lora_step(adapted[-1], inputs)

    row["LoRA step"] = told(lambda: trained(quantized))
    if not row["LoRA step"]:
        row["merge"] = told(lambda: merged(adapted[0]))
    elif told(lambda: trained(load("float"))) == row["LoRA step"]:
        row["LoRA step"] = f"as on the float model: {row['LoRA step']}"
    return row


def shares(found: pql.ModelSummary) -> dict[str, Any]:
    """``parameters`` of a model, ``layers`` that are quantized, ``fraction`` of the parameters in them, ``dense`` as
    reason: [modules, fraction of the parameters, first name]."""
    total = max(1, found.n_parameters)
    return {
        "parameters": found.n_parameters,
        "layers": len(found.quantized),
        "fraction": round(found.fraction_quantized, 4),
        "dense": {
            group.label: [len(group.names), round(group.n_parameters / total, 4), group.names[0]]
            for group in found.by_reason
        },
    }


def full_size(class_name: str) -> dict[str, Any]:
    """:func:`shares` of what the README's config would make of a model of the default config, which has no numbers.

    ``fitted``: the layers with other groups than asked for. ``error`` where there is no such model.
    """
    config = pql.HQQConfig(nbits=4)
    try:
        model_type = getattr(transformers, class_name)
        with torch.device("meta"):
            found = pql.summary(model_type(model_type.config_class()), config)
    except Exception as error:
        return {"error": short(error)}
    fitted = [module.name for module in found.quantized if module.spec != config.spec_for(module.name)]
    return shares(found) | {"fitted": len(fitted)}


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Every quantized layer, but not what PEFT refuses: the ``out_proj`` of Mamba models, whose weight they read."""
    is_mamba = model.config.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
    return [name for name in pql.quantized_modules(model) if not (is_mamba and name.endswith("out_proj"))]


def told(check: Callable[[], str]) -> str:
    """What ``check`` returns; its error in words if it raises one."""
    try:
        return check()
    except Exception as error:
        return short(error)


def short(error: Exception) -> str:
    """Its class and message in one line, without names of temporary folders."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", text)
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 4].rsplit(" ", 1)[0] + " ..."


def differences(first: nn.Module, second: nn.Module, inputs: dict[str, Any] | None) -> str:
    """What differs between two quantized models: layers, specs, compute dtypes, tensors and outputs; "" if nothing."""
    layers, others = pql.quantized_modules(first), pql.quantized_modules(second)
    if missing := sorted(layers.keys() ^ others.keys()):
        return f"{len(missing)} layer(s) are quantized in one only: {missing[0]}"
    for fact in ("spec", "compute_dtype"):
        if found := [name for name in layers if getattr(layers[name], fact) != getattr(others[name], fact)]:
            values = [getattr(layer, fact) for layer in (layers[found[0]], others[found[0]])]
            return f"{fact} of {len(found)} layer(s): {found[0]}: {values[0]}, {values[1]}"
    # Outputs first: the routers of some models change their own dtype when they run.
    return different_outputs(first, second, inputs) or different_states(first, second)


def different_states(first: nn.Module, second: nn.Module) -> str:
    mine, theirs = first.state_dict(), second.state_dict()
    if missing := sorted(mine.keys() ^ theirs.keys()):
        return f"{len(missing)} tensor(s) in one only: {missing[0]}"
    found = [name for name in mine if not same_bits(mine[name], theirs[name])]
    return f"{len(found)} tensor(s) differ: {found[0]}" if found else ""


def different_outputs(first: nn.Module, second: nn.Module, inputs: dict[str, Any] | None) -> str:
    if inputs is None:
        return ""
    outputs = [output_of(model, inputs) for model in (first, second)]
    return "" if same_bits(*outputs) else "the outputs differ"


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = first_float(model(**inputs))
    assert output is not None
    return output


def same_bits(first: Tensor, second: Tensor) -> bool:
    same_type = first.dtype == second.dtype and first.shape == second.shape
    return same_type and bool(((first == second) | (first.isnan() & second.isnan())).all())


def lora_step(peft_model: PeftModel, inputs: dict[str, Any]) -> str:
    """One step of an adapter: its gradients are finite, and nothing else changes."""
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in peft_model.state_dict().items() if "lora_" not in name}
    for name, parameter in trained.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    output = first_float(peft_model(**inputs))
    assert output is not None
    if not output.isfinite().all():
        return "the outputs are not finite"
    output.float().pow(2).mean().backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    if not any(gradient.any() for gradient in gradients.values()):
        return "no gradient reaches an adapter"
    if found := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        return f"{len(found)} gradients are not finite: {found[0]}"
    torch.optim.SGD(trained.values(), lr=0.01).step()
    after = peft_model.state_dict()
    changed = [name for name, tensor in before.items() if not same_bits(tensor, after[name])]
    return f"the step changed {len(changed)} tensors of the base: {changed[0]}" if changed else ""


def merged(peft_model: PeftModel) -> str:
    """A merge keeps every layer quantized as it was, and at least half of the adapter's delta."""
    specs = {name: layer.spec for name, layer in pql.quantized_modules(peft_model.get_base_model()).items()}
    model, report = pql.merge_back(peft_model, progress=False)
    after = {name: layer.spec for name, layer in pql.quantized_modules(model).items()}
    if list(after.values()) != list(specs.values()):
        return "the merge changed the specs"
    return "" if report.delta_retained > 0.5 else f"the merge retained {report.delta_retained:.2f} of the delta"
