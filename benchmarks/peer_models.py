"""Quantize a model with one quantizer, in that quantizer's own environment, and write its weights dequantized.

``bench_peers.py`` prepares the model and the calibration tokens, and scores what this writes. Each quantizer is its
own code with its own defaults, except for bits, groups, the calibration tokens, and what the row's options say. Needs
no package of ours, except to quantize with ours.

    OMP_NUM_THREADS=1 python benchmarks/peer_models.py gptqmodel --bits 3 --group-size 64 --folder FOLDER
"""

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _dense_models import LEFT_DENSE, linear_shapes, load_float, measuring, stored_bits_per_weight, write_dense
from _processor import processor_name
from safetensors.torch import load_file
from torch import Tensor, nn

FLOAT, CALIBRATION, MADE = "float", "calibration.safetensors", "made"
# What "ours-best" chooses from for each layer.
PLANNED_GROUPS = (48, 96)
FINETUNE = {"finetune_epochs": 3, "learning_rate": 3e-3}
# Parameters by name, dequantized; the tensors of the quantizer's own checkpoint; what else a row says.
Made = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def made_by_ours(
    folder: Path,
    ids: Tensor,
    bits: int,
    group_size: int,
    *,
    reads_text: bool = True,
    is_planned: bool = False,
    is_finetuned: bool = False,
) -> Made:
    """``is_planned``: forms by layer, with as many bits as a code, a scale and an integer zero for each group take."""
    import peft_quantlayers as pql
    from peft_quantlayers.methods import get_method

    model, measured = load_float(folder), {}
    left_dense = [name for name, _ in model.named_modules() if name in LEFT_DENSE]
    config = pql.HQQConfig(nbits=bits, group_size=group_size, skip_modules=left_dense)
    if is_planned:
        config = replace(config, double_quant=True, group_size=PLANNED_GROUPS[0])
    way: dict[str, Any] = {"initial_codes": "best"} if is_planned else {}
    way |= FINETUNE if is_finetuned else {}
    calibration = pql.Calibration(data=ids, n_tokens=ids.numel(), sequence_length=ids.shape[1], **way)
    with measuring(measured):
        budget = None
        if is_planned:
            budget = pql.plan_bits(
                model,
                calibration,
                average=bits + (16 + bits) / group_size,
                choices=[
                    {"nbits": n, "group_size": g, "double_quant": n <= 4}
                    for n in (bits - 1, bits, bits + 1)
                    for g in PLANNED_GROUPS
                ],
                config=config,
                progress=False,
            )
        given = calibration if reads_text else None
        pql.quantize_model(model, config, calibration=given, budget=budget, progress=False)
    quantized = {name: layer.quantized_weight for name, layer in pql.quantized_modules(model).items()}
    dense = {f"{name}.weight": get_method(each.spec.method).dequantize(each) for name, each in quantized.items()}
    with tempfile.TemporaryDirectory() as scratch:
        pql.save_model(model, scratch)
        return dense, saved_tensors(Path(scratch)), measured


def made_by_ours_best(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_ours(folder, ids, bits, group_size, is_planned=True)


def made_by_ours_finetuned(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_ours(folder, ids, bits, group_size, is_planned=True, is_finetuned=True)


def made_by_ours_plain(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_ours(folder, ids, bits, group_size, reads_text=False)


def made_by_llmcompressor(modifiers: list[Any], folder: Path, ids: Tensor, said: dict[str, Any]) -> Made:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    model, measured = load_float(folder), dict(said)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    options = {
        "num_calibration_samples": len(ids),
        "max_seq_length": ids.shape[1],
        "shuffle_calibration_samples": False,
    }
    with measuring(measured):
        oneshot(
            model=model, processor=AutoTokenizer.from_pretrained(folder), dataset=data, recipe=modifiers, **options
        )
    dense = dict(model.state_dict())  # scales are folded into norms and other layers too
    for name in linear_shapes(model):
        layer = model.get_submodule(name)
        dense[f"{name}.weight"] = fake_quantize(
            layer.weight.data,
            layer.weight_scale.data,
            layer.weight_zero_point.data if hasattr(layer, "weight_zero_point") else None,
            layer.quantization_scheme.weights,
            layer.weight_g_idx.data if hasattr(layer, "weight_g_idx") else None,
        )
    known = load_file(folder / "model.safetensors")
    dense = {name: tensor.detach().clone() for name, tensor in dense.items() if name in known}
    with tempfile.TemporaryDirectory() as scratch:
        model.half().save_pretrained(scratch, save_compressed=True)  # scales are saved in the model's dtype
        return dense, saved_tensors(Path(scratch)), measured


def llmcompressor_scheme(bits: int, group_size: int) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
    ignored = ["lm_head", "re:.*pooler.*"]
    return {"ignore": ignored, "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def made_by_llmcompressor_gptq(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    from llmcompressor.modifiers.quantization import GPTQModifier

    modifier = GPTQModifier(**llmcompressor_scheme(bits, group_size))
    return made_by_llmcompressor([modifier], folder, ids, {"options": "asymmetric"})


def made_by_llmcompressor_awq(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None  # it fails without an accelerator
    modifiers = [AWQModifier(), QuantizationModifier(**llmcompressor_scheme(bits, group_size))]
    return made_by_llmcompressor(modifiers, folder, ids, {"options": "asymmetric"})


def made_by_gptqmodel(folder: Path, ids: Tensor, bits: int, group_size: int, **options: Any) -> Made:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    measured = {"options": "asymmetric, checkpoint format gptq_v2"}
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=False, format="gptq_v2", **options)
    model = GPTQModel.load(str(folder), config, device="cpu")
    with measuring(measured):
        model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids])
    with tempfile.TemporaryDirectory() as scratch:
        model.save(scratch)
        stored = saved_tensors(Path(scratch))
        loaded = GPTQModel.load(scratch, device="cpu", backend=BACKEND.TORCH)
        dense = {}
        for name, layer in loaded.model.named_modules():
            if hasattr(layer, "dequantize_weight"):
                layer.scales = layer.scales.float()
                with torch.compiler.set_stance("force_eager"):
                    dense[f"{name}.weight"] = layer.dequantize_weight().T
    return dense, stored, measured


def made_by_gptaq(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    from gptqmodel.quantization.config import GPTAQConfig

    return made_by_gptqmodel(folder, ids, bits, group_size, gptaq=GPTAQConfig())


def from_multiples(layer: nn.Module) -> Tensor:
    """(out_features, in_features), float32: a bfloat16 weight of multiples of ``layer.scale``, as its codes say it."""
    groups = layer.weight.detach().float().unflatten(1, (layer.scale.shape[1], -1))
    scale = layer.scale.float()[..., None]
    return ((groups / scale).round() * scale).flatten(1)


def made_by_autoround(folder: Path, ids: Tensor, bits: int, group_size: int, *, in_full: bool = False) -> Made:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = load_float(folder)
    iterations, batch_size = (200, 8) if in_full else (50, 4)  # its defaults, and an eighth of their work
    said = f"asymmetric, bfloat16, {iterations} iterations of batches of {batch_size}"
    measured = {"options": said if in_full else f"{said} (its defaults: 200, 8)"}
    data = torch.utils.data.DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids])
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=group_size,
        sym=False,
        iters=iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=data,
        device_map="cpu",
        batch_size=batch_size,
        enable_torch_compile=False,
    )
    with measuring(measured):
        tuned, _ = tuner.quantize()
    dense = {f"{name}.weight": from_multiples(tuned.get_submodule(name)) for name in linear_shapes(model)}
    with tempfile.TemporaryDirectory() as scratch:
        tuner.save_quantized(scratch, format="auto_round:auto_gptq")  # the 4-bit default, auto_awq, fails in 0.16.1
        return dense, saved_tensors(Path(scratch)), measured


def made_by_autoround_in_full(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_autoround(folder, ids, bits, group_size, in_full=True)


def made_by_bitsandbytes(folder: Path, ids: Tensor, bits: int, group_size: int, *, double: bool = False) -> Made:
    import bitsandbytes as bnb
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head", "pooler"],
    )
    kind = AutoModelForCausalLM if "ForCausalLM" in type(load_float(folder)).__name__ else AutoModel
    measured: dict[str, Any] = {"options": "scales in 8 bits" if double else ""}
    with measuring(measured):  # which includes loading: it quantizes on the way
        model = kind.from_pretrained(folder, dtype=torch.float32, quantization_config=config, device_map="cpu")
    dense = {
        f"{name}.weight": bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    return dense, dict(model.state_dict()), measured


def made_by_bitsandbytes_double(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_bitsandbytes(folder, ids, bits, group_size, double=True)


def made_by_torchao(folder: Path, ids: Tensor, bits: int, group_size: int, *, algorithm: str = "tinygemm") -> Made:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    # bfloat16: scales and zeros are kept in the model's dtype.
    model, measured = load_float(folder, torch.bfloat16), {"options": f"int4 for CPUs, {algorithm}, bfloat16"}
    shapes = linear_shapes(model)
    chosen = Int4ChooseQParamsAlgorithm(algorithm)
    config = PrototypeInt4WeightOnlyConfig(group_size=group_size, int4_choose_qparams_algorithm=chosen)
    with measuring(measured):
        quantize_(model, config, filter_fn=lambda module, name: name in shapes)
    dense, stored = {}, {}
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        columns = nn.functional.linear(torch.eye(shape[1], dtype=torch.bfloat16), layer.weight)
        dense[f"{name}.weight"] = columns.T
        stored |= {f"{name}.weight.{part}": getattr(layer.weight, part) for part in ("qdata", "scale_and_zero")}
    return dense, stored, measured


def made_by_torchao_hqq(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    return made_by_torchao(folder, ids, bits, group_size, algorithm="hqq")


def made_by_quanto(folder: Path, ids: Tensor, bits: int, group_size: int) -> Made:
    from optimum import quanto

    # bfloat16: scales and shifts are kept in the model's dtype.
    model, measured = load_float(folder, torch.bfloat16), {"options": "groups of its own choice, bfloat16"}
    names = list(linear_shapes(model))
    with measuring(measured):
        quanto.quantize(model, weights={2: quanto.qint2, 4: quanto.qint4}[bits], include=names)
        quanto.freeze(model)
    dense = {f"{name}.weight": model.get_submodule(name).weight.dequantize() for name in names}
    stored = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("put_scale")}
    return dense, stored, measured


# What is installed, and the function.
MAKERS: dict[str, tuple[str, Callable[[Path, Tensor, int, int], Made]]] = {
    "ours": ("peft_quantlayers", made_by_ours),
    "ours-best": ("peft_quantlayers", made_by_ours_best),
    "ours-finetuned": ("peft_quantlayers", made_by_ours_finetuned),
    "ours-plain": ("peft_quantlayers", made_by_ours_plain),
    "llmcompressor-gptq": ("llmcompressor", made_by_llmcompressor_gptq),
    "llmcompressor-awq": ("llmcompressor", made_by_llmcompressor_awq),
    "gptqmodel": ("gptqmodel", made_by_gptqmodel),
    "gptqmodel-gptaq": ("gptqmodel", made_by_gptaq),
    "auto-round": ("auto-round", made_by_autoround),
    "auto-round-full": ("auto-round", made_by_autoround_in_full),
    "bitsandbytes-nf4": ("bitsandbytes", made_by_bitsandbytes),
    "bitsandbytes-nf4-double": ("bitsandbytes", made_by_bitsandbytes_double),
    "torchao": ("torchao", made_by_torchao),
    "torchao-hqq": ("torchao", made_by_torchao_hqq),
    "quanto": ("optimum-quanto", made_by_quanto),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maker", choices=MAKERS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, required=True, help="as bench_peers.py prepared it")
    args = parser.parse_args()
    package, make = MAKERS[args.maker]
    ids = load_file(args.folder / CALIBRATION)["input_ids"]
    torch.manual_seed(0)
    dense, stored, said = make(args.folder / FLOAT, ids, args.bits, args.group_size)
    shapes = linear_shapes(load_float(args.folder / FLOAT))
    if missing := [name for name in shapes if f"{name}.weight" not in dense]:
        raise SystemExit(f"{args.maker} left layers as they were: {missing}. Nothing was written.")
    measured = {
        "maker": args.maker,
        "bits": args.bits,
        "group_size": args.group_size,
        "bits_per_weight": stored_bits_per_weight(stored, shapes),
        **said,
        "threads": torch.get_num_threads(),
        "cpu": processor_name(),
        "versions": {name: importlib.metadata.version(name) for name in (package, "torch", "transformers")},
    }
    output = args.folder / MADE / f"{args.maker}-{args.bits}-{args.group_size}"
    write_dense(args.folder / FLOAT, output, dense, measured)
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
