"""What works, is refused, crashes or is ignored: PEFT's methods on our layers and on those that PEFT supports itself.

Every method is attached to two linear layers, or to a tiny language model, given the same random adapter as on the
dequantized dense model, and compared with that: its effect on the output, gradients, save and load, merge and unmerge.
What PEFT does with adapters (hotswap, mixed batches, ...) is compared in the same way. Writes
``benchmarks/results/peft_features.json``; ``--only PATTERN`` measures single rows again.
"""

import argparse
import atexit
import copy
import fnmatch
import functools
import json
import logging
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aqlm
import peft
import torch
from _device import describe_device
from hqq.core.quantize import BaseQuantizeConfig
from hqq.core.quantize import HQQLinear as PeerHQQLinear
from peft import PeftModel, get_peft_model
from peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
    create_arrow_model,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import peft_quantlayers as pql

RESULT = Path(__file__).parent / "results" / "peft_features.json"
SIZE = 64
# Of the HQQ layers; QA-LoRA pools the inputs of a group.
GROUP_SIZE = 16
# Of the language model; none of them pads.
TOKEN_IDS = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(1))
# Outputs are compared relative to their norm. The bases hold 8 bits a weight or more, whose rounding stays below.
SAME_OUTPUT, SAME_EFFECT = 0.03, 0.05
# Of an error, in characters; cut off between words.
MESSAGE_LENGTH = 480

# One config, or several for adapters of a mixed model.
Configs = peft.PeftConfig | tuple[peft.PeftConfig, ...]


def lora(**fields: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, **{k: v() if callable(v) else v for k, v in fields.items()}}
    )


def xlora() -> peft.PeftConfig:
    return peft.XLoraConfig(hidden_size=SIZE, adapters=saved_experts())


METHODS: dict[str, Callable[[], Configs]] = {
    "LoRA": lora(),
    "LoRA, rsLoRA": lora(use_rslora=True),
    "LoRA, DoRA": lora(use_dora=True),
    "LoRA, lora_bias": lora(lora_bias=True),
    "LoRA, VeLoRA": lora(velora_config=lambda: VeloraConfig(num_groups=4, init_type="random")),
    "LoRA, KaSA": lora(kasa_config=KasaConfig),
    "LoRA, MonteCLoRA": lora(monteclora_config=lambda: MontecloraConfig(num_samples=2)),
    "LoRA, BD-LoRA": lora(
        use_bdlora=lambda: BdLoraConfig(target_modules_bd_a=["second"], target_modules_bd_b=["first"], nblocks=2)
    ),
    "LoRA, QA-LoRA": lora(use_qalora=True, qalora_group_size=GROUP_SIZE),
    "LoRA, MiCA": lora(init_lora_weights="mica"),
    "LoRA, gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, PiSSA": lora(init_lora_weights="pissa"),
    "LoRA, PiSSA, niter": lora(init_lora_weights="pissa_niter_4"),
    "LoRA, OLoRA": lora(init_lora_weights="olora"),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, EVA": lora(init_lora_weights="eva", eva_config=lambda: EvaConfig(rho=1.0)),
    "LoRA, CorDA": lora(init_lora_weights="corda", corda_config=CordaConfig),
    "LoRA, LoRA-GA": lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig),
    "LoRA, LoftQ in the config": lora(init_lora_weights="loftq", loftq_config=lambda: {"loftq_bits": 4}),
    "LoRA, rank_pattern": lora(rank_pattern=lambda: {"first": 2}),
    "LoRA, alpha_pattern": lora(alpha_pattern=lambda: {"first": 32}),
    "LoRA, all-linear": lora(target_modules="all-linear"),
    "LoRA, exclude_modules": lora(target_modules="all-linear", exclude_modules=lambda: ["second"]),
    "LoRA, aLoRA": lora(alora_invocation_tokens=lambda: TOKEN_IDS[0, 4:6].tolist(), task_type="CAUSAL_LM"),
    "LoRA, layers_to_transform": lora(layers_to_transform=lambda: [1]),
    "LoRA, layer_replication": lora(layer_replication=lambda: [[0, 2], [0, 2]]),
    "LoRA, modules_to_save": lora(modules_to_save=lambda: ["lm_head"]),
    "LoRA, trainable_token_indices": lora(trainable_token_indices=lambda: [3, 5]),
    "LoRA, ensure_weight_tying": lora(
        target_modules=lambda: ["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, total_step=1, orth_reg_weight=0.0),
    "AdaMSS": lambda: peft.AdamssConfig(r=8),
    "BEFT": lambda: peft.BeftConfig(),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4),
    "C3A": lambda: peft.C3AConfig(block_size=16),
    "DeFT": lambda: peft.DeftConfig(),
    "DeLoRA": lambda: peft.DeloraConfig(r=4),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50),
    "FRoD": lambda: peft.FrodConfig(),
    "GLoRA": lambda: peft.GloraConfig(),
    "GraLoRA": lambda: peft.GraloraConfig(r=4),
    "HiRA": lambda: peft.HiraConfig(r=4),
    "HRA": lambda: peft.HRAConfig(r=4),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["second"]),
    "Lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2),
    "LN tuning": lambda: peft.LNTuningConfig(),
    "LoHa": lambda: peft.LoHaConfig(r=4),
    "LoKr": lambda: peft.LoKrConfig(r=4),
    "MiSS": lambda: peft.MissConfig(r=4),
    "MiSS, bat": lambda: peft.MissConfig(r=4, init_weights="bat"),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4),
    "OSF": lambda: peft.OSFConfig(effective_rank=4),
    "PeaNuT": lambda: peft.PeanutConfig(r=4, depth=0, act_fn="relu"),
    "PSOFT": lambda: peft.PsoftConfig(r=4, psoft_alpha=4),
    "PVeRA": lambda: peft.PveraConfig(r=8),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4),
    "RoAd": lambda: peft.RoadConfig(group_size=16),
    "SHiRA": lambda: peft.ShiraConfig(r=4, random_seed=1),
    "Supertuning": lambda: peft.SupertuningConfig(sparsity=0.5),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=16),
    "UniLoRA": lambda: peft.UniLoraConfig(theta_d_length=101),
    "VB-LoRA": lambda: peft.VBLoRAConfig(vector_length=16, num_vectors=5),
    "VeRA": lambda: peft.VeraConfig(r=8),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=50),
    "X-LoRA": xlora,
    "mixed: LoRA, OFT": lambda: (lora()(), peft.OFTConfig(oft_block_size=4)),
    "mixed: LoKr, LoHa": lambda: (peft.LoKrConfig(r=4), peft.LoHaConfig(r=4)),
}


class Two(nn.Module):
    """Two biased linears with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Speaker(nn.Module):
    """The two linears as the body of what X-LoRA takes for a language model: it looks at the hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = PreTrainedConfig(use_cache=False)
        self.embed_tokens = nn.Embedding(1, SIZE)
        self.model = model

    def forward(self, inputs_embeds: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.model(inputs_embeds)
        return SimpleNamespace(logits=logits, hidden_states=(inputs_embeds, logits))


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """(n, SIZE) for an ``x`` (n, SIZE), whatever kind of model it is; the logits of a language model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, Speaker):
        return model(inputs_embeds=x[None]).logits[0]
    if isinstance(base, PreTrainedModel):
        return model(input_ids=TOKEN_IDS).logits
    return model(x)


def float_model() -> Two:
    torch.manual_seed(0)
    return Two().requires_grad_(False)


def float_llama(*, is_tied: bool = False) -> LlamaForCausalLM:
    """A language model of two layers, all of whose linears have SIZE inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=32, pad_token_id=0, tie_word_embeddings=is_tied)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


# What a method is measured on, where that is not ``float_model``.
FLOAT_MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA, aLoRA": float_llama,
    "LoRA, layers_to_transform": float_llama,
    "LoRA, layer_replication": float_llama,
    "LoRA, modules_to_save": float_llama,
    "LoRA, trainable_token_indices": float_llama,
    "LoRA, ensure_weight_tying": functools.partial(float_llama, is_tied=True),
}


@functools.cache
def saved_experts() -> dict[str, str]:
    """Names and folders of two LoRA adapters for X-LoRA to mix."""
    folder = Path(tempfile.mkdtemp(prefix="experts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("0", "1"):
        torch.manual_seed(int(name))
        config = peft.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
        get_peft_model(Speaker(float_model()), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("0", "1")}


def our_hqq(model: nn.Module) -> nn.Module:
    return pql.quantize_model(model, pql.HQQConfig(nbits=8, group_size=GROUP_SIZE), progress=False)


def our_aqlm(model: nn.Module) -> nn.Module:
    """A vector is a whole row, so that the codebook holds every weight: what is compared is not the rounding."""
    config = pql.AQLMConfig(num_codebooks=1, in_group_size=SIZE, scale_dtype="float32")
    return pql.quantize_model(model, config, progress=False)


def pefts_hqq(model: nn.Module) -> nn.Module:
    for name, linear in linears_of(model).items():
        settings = BaseQuantizeConfig(nbits=8, group_size=GROUP_SIZE, axis=1)
        layer = PeerHQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device="cpu", del_orig=False)
        model.set_submodule(name, layer)
    return model


def pefts_aqlm(model: nn.Module) -> nn.Module:
    """The stock package's layers; each row of the weight is an entry of the codebook.

    Codes have 16 bits: the package's kernel for 8 has no working backward pass on a CPU.
    """
    for name, linear in linears_of(model).items():
        layer = aqlm.QuantizedLinear(
            SIZE, linear.out_features, SIZE, 1, 1, 16, bias=linear.bias is not None, device="cpu",
            dtype=linear.weight.dtype,
        )  # fmt: skip
        layer.requires_grad_(False)
        layer.codebooks.zero_()[0, : linear.out_features, 0] = linear.weight
        layer.codes.copy_(torch.arange(linear.out_features, dtype=torch.int16).view(-1, 1, 1))
        layer.scales.fill_(1.0)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        model.set_submodule(name, layer)
    return model


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantized: all but the output head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if name != "lm_head"}


def dense_of(model: nn.Module) -> nn.Module:
    """Plain linears with the weights that the layers of ``model`` stand for, read off the outputs of foreign ones."""
    if pql.quantized_modules(model):
        return pql.dequantize_model(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (PeerHQQLinear, aqlm.QuantizedLinear)):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            with torch.no_grad():
                shift = layer(torch.zeros(1, SIZE))
                dense.weight.copy_((layer(torch.eye(SIZE)) - shift).t())
                if layer.bias is not None:
                    dense.bias.copy_(shift[0])
            model.set_submodule(name, dense.requires_grad_(False))
    return model


BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ours, HQQ": our_hqq,
    "ours, AQLM": our_aqlm,
    "PEFT's own, HQQ": pefts_hqq,
    "PEFT's own, AQLM": pefts_aqlm,
}

# Inputs that EVA, CorDA and LoRA-GA look at.
SEEN = torch.randn(4 * SIZE, SIZE, generator=torch.Generator().manual_seed(4))


def prepare(model: nn.Module, config: peft.PeftConfig) -> None:
    """What some initialisers ask for before the adapter is made."""
    init = getattr(config, "init_lora_weights", None)
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: model(SEEN), hooked_model=model)
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(SEEN).square().mean().backward())


def initialize(model: nn.Module, config: peft.PeftConfig) -> None:
    """What others ask for after it."""
    if getattr(config, "init_lora_weights", None) == "eva":
        peft.initialize_lora_eva_weights(
            model, list(SEEN.split(SIZE)), forward_fn=lambda model, batch: model(batch), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip


def targets_of(model: nn.Module) -> list[str]:
    return ["q_proj", "up_proj"] if isinstance(model, PreTrainedModel) else ["first", "second"]


def adapted(model: nn.Module, make_config: Callable[[], Configs]) -> nn.Module:
    """``model`` with the method on it, all trainable numbers shifted by the same random ones on every base."""
    torch.manual_seed(1)
    made = make_config()
    configs = made if isinstance(made, tuple) else (made,)
    for config in configs:
        if getattr(config, "target_modules", None) is None and not isinstance(config, peft.XLoraConfig):
            config.target_modules = set(targets_of(model))
    if isinstance(made, tuple):
        model = get_peft_model(model, configs[0], adapter_name="0", mixed=True)
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(str(number), config)
        model.set_adapter([str(number) for number in range(len(configs))])
    else:
        prepare(model, made)
        torch.manual_seed(1)
        model = get_peft_model(Speaker(model) if isinstance(made, peft.XLoraConfig) else model, made)
        initialize(model, made)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def reference_of(model: nn.Module, base: Callable[[], nn.Module], make_config: Callable[[], Configs]) -> nn.Module:
    """The adapter of ``model`` on the dequantized dense model.

    PEFT's dense layers do not support QA-LoRA. Its delta is that of a LoRA whose first matrix has the same column for
    all inputs of a group: PEFT averages them, and multiplies with the number of groups.
    """
    config = make_config()
    if not getattr(config, "use_qalora", False):
        return adapted(dense_of(base()), make_config)
    reference = adapted(dense_of(base()), METHODS["LoRA"])
    adapters, own = reference.state_dict(), model.state_dict()
    for name in [name for name in adapters if "lora_" in name]:
        factor = own[name]
        if "lora_A" in name:
            if factor.shape[1] == SIZE:
                raise Wrong("ignored in silence: the adapter is that of plain LoRA")
            factor = (factor * factor.shape[1] / GROUP_SIZE).repeat_interleave(GROUP_SIZE, dim=1)
        adapters[name].copy_(factor)
    return reference


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def effect(model: nn.Module, x: Tensor) -> Tensor:
    """What the adapter adds to the output."""
    with torch.no_grad(), model.disable_adapter():
        base = output_of(model, x)
    return output_of(model, x) - base


class Wrong(Exception):
    """The method ran, and its results differ from those of the dense model."""


def check(base: Callable[[], nn.Module], make_config: Callable[[], Configs], x: Tensor) -> list[str]:
    """What was found to work, in words. Raises :class:`Wrong`, or what the method raised."""
    done = []
    model = adapted(base(), make_config)
    reference = reference_of(model, base, make_config)
    expected = effect(reference, x)
    n_adapted, n_expected = (
        sum(isinstance(m, BaseTunerLayer) for m in candidate.modules()) for candidate in (model, reference)
    )
    if n_adapted != n_expected:
        raise Wrong(f"{n_adapted} layers get an adapter, and {n_expected} should")
    found = effect(model, x)
    if distance(found, expected) > SAME_EFFECT:
        plain = effect(adapted(base(), METHODS["LoRA"]), x)
        if plain.shape == found.shape and distance(found, plain) < SAME_EFFECT:
            raise Wrong("ignored in silence: the output is that of plain LoRA")
        raise Wrong(f"the adapter's effect differs from the dense model's by {distance(found, expected):.0%}")
    model.zero_grad()
    output_of(model, x).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise Wrong("no gradient, or NaN in it")
    done.append("train")

    adapted_output = output_of(model, x).detach()
    return done + saving(model, reference, base, x) + merging(model, reference, adapted_output, x)


@torch.no_grad()
def saving(model: nn.Module, reference: nn.Module, base: Callable[[], nn.Module], x: Tensor) -> list[str]:
    if not isinstance(model, PeftModel):
        return []  # PEFT does not save mixed models

    def change_by_loading(adapted: PeftModel, fresh: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            fresh = Speaker(fresh) if isinstance(adapted.get_base_model(), Speaker) else fresh
            loaded = PeftModel.from_pretrained(fresh, folder).eval()
        return distance(output_of(loaded, x), output_of(adapted, x))

    try:
        of_reference = change_by_loading(reference, dense_of(base()))
    except ValueError:
        of_reference = float("inf")
    if of_reference > SAME_OUTPUT:
        return []  # on a dense model the adapter does not come back as it was either, on the base that it began with
    changed = change_by_loading(model, base())
    if changed > SAME_OUTPUT:
        raise Wrong(f"after save and load the output differs by {changed:.0%}")
    return ["save and load"]


@torch.no_grad()
def merging(model: nn.Module, reference: nn.Module, adapted_output: Tensor, x: Tensor) -> list[str]:
    try:
        before = output_of(reference, x)
        reference.merge_adapter()
        merged = output_of(reference, x)
        reference.unmerge_adapter()
    except Exception:
        return []  # the method does not merge and unmerge on a dense model either
    if distance(merged, before) > SAME_OUTPUT:
        return []  # or says that it does, and merges something else
    try:
        model.merge_adapter()
        merged = output_of(model, x)
        model.unmerge_adapter()
        unmerged = output_of(model, x)
        unloaded = output_of(model.merge_and_unload(), x)
    except Exception as error:
        return [f"merge {said(error)}"]
    for what, output in {"merge": merged, "unmerge": unmerged, "merge_and_unload": unloaded}.items():
        if distance(output, adapted_output) > SAME_OUTPUT:
            return [f"{what} is wrong: the output differs by {distance(output, adapted_output):.0%}"]
    return ["merge"]


Quantize = Callable[[nn.Module], nn.Module]


def compare(found: Tensor, expected: Tensor, what: str = "the output") -> None:
    if not torch.isfinite(found).all():
        raise Wrong(f"{what} holds NaN or Inf")
    if distance(found, expected) > SAME_OUTPUT:
        raise Wrong(f"{what} differs from the dense model's by {distance(found, expected):.0%}")


def with_two(model: nn.Module) -> PeftModel:
    """``model`` with the adapters "default" and "other", both random."""
    targets = targets_of(model)
    torch.manual_seed(1)
    model = get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets[1:], init_lora_weights=False))
    return model.eval()


def both(quantize: Quantize, make: Callable[[], nn.Module] = float_model) -> tuple[PeftModel, PeftModel]:
    """Two adapters on the quantized model, and on the dense one with its weights."""
    return with_two(quantize(make())), with_two(dense_of(quantize(make())))


@torch.no_grad()
def several_active(quantize: Quantize, x: Tensor) -> list[str]:
    model, reference = both(quantize)
    for each in (model, reference):
        each.base_model.set_adapter(["default", "other"])
    compare(model(x), reference(x))
    return ["output of the sum"]


@torch.no_grad()
def mixed_batch(quantize: Quantize, x: Tensor) -> list[str]:
    model, reference = both(quantize)
    names = ["default", "other", "__base__", "default"] * 4
    compare(model(x, adapter_names=names), reference(x, adapter_names=names))
    return ["output of each row"]


@torch.no_grad()
def mixed_generation(quantize: Quantize, x: Tensor) -> list[str]:
    texts = []
    for model in both(quantize, float_llama):
        names, prompt = ["default", "other", "__base__"], TOKEN_IDS[:1].expand(3, -1)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        texts.append(model.generate(input_ids=prompt, adapter_names=names, **options))
    if not torch.equal(*texts):
        raise Wrong("other tokens than the dense model's")
    return ["tokens of each row"]


COMBINATIONS = (
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip


@torch.no_grad()
def weighted(quantize: Quantize, x: Tensor) -> list[str]:
    for combination in COMBINATIONS:
        density = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
        outputs = []
        for model in both(quantize):
            torch.manual_seed(7)  # of the third adapter, and of what the combination drops
            model.add_adapter("third", model.peft_config["default"])
            weights = {"adapters": ["default", "third"], "weights": [0.7, 0.4], "adapter_name": "sum"}
            model.add_weighted_adapter(**weights, combination_type=combination, **density)
            model.set_adapter("sum")
            outputs.append(model(x))
        compare(*outputs, what=f"{combination}: the output")
    return list(COMBINATIONS)


def saved_ranks(quantize: Quantize, folder: str, x: Tensor) -> dict[int, Tensor]:
    """Outputs of adapters of rank 2 and 4, which are saved under their rank."""
    outputs = {}
    for rank in (2, 4):
        torch.manual_seed(rank)
        config = peft.LoraConfig(r=rank, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(dense_of(quantize(float_model())), config).eval()
        outputs[rank] = model(x)
        model.save_pretrained(f"{folder}/{rank}")
    return outputs


@torch.no_grad()
def hotswap(quantize: Quantize, x: Tensor, *, is_compiled: bool = False) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = saved_ranks(quantize, folder, x)
        model = PeftModel.from_pretrained(quantize(float_model()), f"{folder}/2").eval()
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        run = torch.compile(model, backend=counter) if is_compiled else model
        compare(run(x), outputs[2])
        n_compiled = counter.frame_count
        for rank in (4, 2):
            hotswap_adapter(model, f"{folder}/{rank}", adapter_name="default")
            compare(run(x), outputs[rank], what=f"after swapping to rank {rank} the output")
    if counter.frame_count > n_compiled:
        raise Wrong("the model is compiled again after a swap")
    return ["output after each swap", *(["compiled once"] if is_compiled else [])]


@torch.no_grad()
def low_cpu_mem_usage(quantize: Quantize, x: Tensor) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = saved_ranks(quantize, folder, x)
        base = quantize(float_model())
        compare(PeftModel.from_pretrained(base, f"{folder}/4", low_cpu_mem_usage=True).eval()(x), outputs[4])
    return ["output after loading"]


def adapter_dtype(quantize: Quantize, x: Tensor) -> list[str]:
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        base = quantize(float_model().to(torch.bfloat16))
        model = get_peft_model(base, lora(target_modules=["first", "second"])(), autocast_adapter_dtype=autocast)
        found = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        if found != {expected}:
            raise Wrong(f"autocast_adapter_dtype={autocast} on a bfloat16 layer gives {found}, not {expected}")
        if not torch.isfinite(model(x.bfloat16())).all():
            raise Wrong("the output is not finite")
    return ["float32 and bfloat16"]


def status(quantize: Quantize, x: Tensor) -> list[str]:
    backends = {layer.quantization_backend for layer in with_two(quantize(float_model())).get_layer_status()}
    if None in backends:
        raise Wrong("get_layer_status names no quantization backend")
    return [f"get_layer_status names {', '.join(sorted(map(str, backends)))}"]


def counts(quantize: Quantize, x: Tensor) -> list[str]:
    found, expected = (model.get_nb_trainable_parameters() for model in both(quantize))
    if found != expected:
        raise Wrong(f"{found[0]:,} trainable of {found[1]:,} parameters; they are {expected[0]:,} of {expected[1]:,}")
    return ["weights, not bytes"]


def model_card(quantize: Quantize, x: Tensor) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        with_two(quantize(float_llama())).save_pretrained(folder)
        if "library_name: peft" not in (Path(folder) / "README.md").read_text():
            raise Wrong("no model card")
    return ["written"]


@torch.no_grad()
def loftq(quantize: Quantize, x: Tensor) -> list[str]:
    """Ours with our function, the others with PEFT's; both look at the weights from before."""
    targets = list(linears_of(float_llama()))
    model = get_peft_model(quantize(float_llama()), peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets)).eval()
    expected = output_of(float_llama(), x)
    before = distance(output_of(model, x), expected)
    with tempfile.TemporaryDirectory() as folder:
        float_llama().save_pretrained(folder)
        if pql.quantized_modules(model):
            results = pql.initialize_loftq(model, folder, progress=False)
            if any(result.error_after >= result.error_before for result in results):
                raise Wrong("the weights are no nearer to the float ones")
        else:
            peft.replace_lora_weights_loftq(model, folder)
    if distance(output_of(model, x), expected) >= before:
        raise Wrong("the output is no nearer to the float model's")
    return ["nearer to the float model"]


@torch.no_grad()
def arrow(quantize: Quantize, x: Tensor) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("0", "1"):
            torch.manual_seed(int(name))
            config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(float_llama(), config).save_pretrained(f"{folder}/{name}")
        paths, outputs = [f"{folder}/0", f"{folder}/1"], []
        for base in (quantize(float_llama()), dense_of(quantize(float_llama()))):
            routing = ArrowConfig(top_k=1, rng_seed=0)
            model = create_arrow_model(base, task_specific_adapter_paths=paths, arrow_config=routing)
            outputs.append(output_of(model.eval(), x))
    compare(*outputs)
    return ["output of the routed experts"]


# What PEFT does with LoRA adapters, besides training them.
FEATURES: dict[str, Callable[[Quantize, Tensor], list[str]]] = {
    "LoRA, LoftQ from the float model": loftq,
    "Arrow": arrow,
    "several active adapters": several_active,
    "mixed batches": mixed_batch,
    "mixed batches, generation": mixed_generation,
    "add_weighted_adapter": weighted,
    "hotswap": hotswap,
    "hotswap, compiled": functools.partial(hotswap, is_compiled=True),
    "low_cpu_mem_usage": low_cpu_mem_usage,
    "autocast_adapter_dtype": adapter_dtype,
    "status": status,
    "parameter counts": counts,
    "model card": model_card,
}


def said(error: Exception) -> str:
    """Whether ``error`` was raised on purpose, with what message; else where it crashed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    package = next((name for name in ("peft_quantlayers", "peft", "hqq", "aqlm") if f"/{name}/" in frame.filename), "")
    message = re.sub(r"(?<!\w)(/[^/\s\"]+)+/", "", " ".join(str(error).split())) or type(error).__name__
    message = textwrap.shorten(message, MESSAGE_LENGTH, placeholder=" ...")
    if package and (frame.line or "").lstrip().startswith("raise"):
        return f"refused: {message}"
    return f"crash: {type(error).__name__}: {message}"


@functools.cache
def _quantized(base: str, make_float: Callable[[], nn.Module]) -> nn.Module:
    return BASES[base](make_float())


def cell(name: str, base: str) -> dict[str, str]:
    """Row ``name`` on the layers ``base``, measured.

    ``state`` is one of works, merge refused, merge crashes, merge wrong, refused, crash, wrong.
    """
    x = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(3))
    try:
        if name in FEATURES:
            done = FEATURES[name](BASES[base], x)
        else:
            make_float = FLOAT_MODELS.get(name, float_model)
            done = check(lambda: copy.deepcopy(_quantized(base, make_float)), METHODS[name], x)
    except Wrong as wrong:
        return {"state": "wrong", "detail": str(wrong)}
    except Exception as error:
        detail = said(error)
        return {"state": detail.partition(":")[0], "detail": detail.partition(": ")[2]}
    last = done[-1]
    if last.startswith("merge "):
        state = {"refused": "merge refused", "crash": "merge crashes", "is": "merge wrong"}
        return {"state": state[last.split()[1].rstrip(":")], "detail": last}
    if "merge_and_unload" in last or "unmerge" in last:
        return {"state": "merge wrong", "detail": last}
    return {"state": "works", "detail": ", ".join(done)}


def rows(pattern: str = "*") -> list[dict[str, Any]]:
    found = []
    for name in (*METHODS, *FEATURES):
        if fnmatch.fnmatch(name, pattern):
            cells = {base: cell(name, base) for base in BASES}
            found.append({"method": name, **cells})
            print(name, {base: each["state"] for base, each in cells.items()}, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="pattern of method names: measure these again, and keep the other rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("peft_quantlayers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = rows(args.only or "*")
    if args.only:
        known = {row["method"]: row for row in json.loads(RESULT.read_text())["rows"] + found}
        found = [known[name] for name in (*METHODS, *FEATURES) if name in known]
    RESULT.write_text(json.dumps({"device": describe_device(), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
