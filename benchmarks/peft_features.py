"""What works, is refused, crashes or is ignored: PEFT's methods on our layers and on those that PEFT supports itself.

Every method is attached to two linear layers, given the same random adapter as on the dequantized dense model, and
compared with that: its effect on the output, gradients, save and load, merge and unmerge. Writes
``benchmarks/results/peft_features.json``; ``--only PATTERN`` measures single rows again.
"""

import argparse
import atexit
import fnmatch
import functools
import json
import shutil
import sys
import tempfile
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
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

import peft_quantlayers as pql

RESULT = Path(__file__).parent / "results" / "peft_features.json"
SIZE = 64
# Of the HQQ layers; QA-LoRA pools the inputs of a group.
GROUP_SIZE = 16
# Outputs are compared relative to their norm. The bases hold 8 bits a weight or more, whose rounding stays below.
SAME_OUTPUT, SAME_EFFECT = 0.03, 0.05

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
    "LoRA, PiSSA": lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": lora(init_lora_weights="olora"),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, all-linear": lora(target_modules="all-linear"),
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
    """(n, SIZE) for an ``x`` (n, SIZE), whatever kind of model it is."""
    if isinstance(model, PeftModel) and isinstance(model.get_base_model(), Speaker):
        return model(inputs_embeds=x[None]).logits[0]
    return model(x)


def float_model() -> Two:
    torch.manual_seed(0)
    return Two().requires_grad_(False)


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


def our_hqq() -> nn.Module:
    return pql.quantize_model(float_model(), pql.HQQConfig(nbits=8, group_size=GROUP_SIZE), progress=False)


def our_aqlm() -> nn.Module:
    """A vector is a whole row, so that the codebook holds every weight: what is compared is not the rounding."""
    config = pql.AQLMConfig(num_codebooks=1, in_group_size=SIZE, scale_dtype="float32")
    return pql.quantize_model(float_model(), config, progress=False)


def pefts_hqq() -> nn.Module:
    model = float_model()
    for name, linear in list(model.named_children()):
        settings = BaseQuantizeConfig(nbits=8, group_size=GROUP_SIZE, axis=1)
        layer = PeerHQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
        setattr(model, name, layer)
    return model


def pefts_aqlm() -> nn.Module:
    """The stock package's layers with the codes of ours: the same weights."""
    model = our_aqlm()
    for name, ours in list(model.named_children()):
        layer = aqlm.QuantizedLinear(
            SIZE, SIZE, ours.spec.in_group_size, ours.spec.out_group_size, ours.spec.num_codebooks,
            ours.spec.nbits_per_codebook, bias=True, device="cpu", dtype=torch.float32,
        )  # fmt: skip
        layer.load_state_dict(ours.state_dict())
        setattr(model, name, layer.requires_grad_(False))
    return model


def dense_of(model: nn.Module) -> nn.Module:
    """Plain linears with the weights that the layers of ``model`` stand for, read off the outputs of foreign ones."""
    if pql.quantized_modules(model):
        return pql.dequantize_model(model)
    dense = float_model()
    for name, layer in model.named_children():
        with torch.no_grad():
            shift = layer(torch.zeros(1, SIZE))
            getattr(dense, name).weight.copy_((layer(torch.eye(SIZE)) - shift).t())
            getattr(dense, name).bias.copy_(shift[0])
    return dense


BASES = {
    "ours, HQQ": our_hqq,
    "ours, AQLM": our_aqlm,
    "PEFT's own, HQQ": pefts_hqq,
    "PEFT's own, AQLM": pefts_aqlm,
}


def adapted(model: nn.Module, make_config: Callable[[], Configs]) -> nn.Module:
    """``model`` with the method on it, all trainable numbers shifted by the same random ones on every base."""
    torch.manual_seed(1)
    made = make_config()
    configs = made if isinstance(made, tuple) else (made,)
    for config in configs:
        if getattr(config, "target_modules", None) is None and not isinstance(config, peft.XLoraConfig):
            config.target_modules = {"first", "second"}
    if isinstance(made, tuple):
        model = get_peft_model(model, configs[0], adapter_name="0", mixed=True)
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(str(number), config)
        model.set_adapter([str(number) for number in range(len(configs))])
    else:
        model = get_peft_model(Speaker(model) if isinstance(made, peft.XLoraConfig) else model, made)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def reference_of(model: nn.Module, base: Callable[[], nn.Module], make_config: Callable[[], Configs]) -> nn.Module:
    """The adapter of ``model`` on the dequantized dense model.

    QA-LoRA is unknown to PEFT's dense layers. Its change of the weight is that of a LoRA whose first matrix has the
    same column for all inputs of a group: PEFT averages them, and multiplies with the number of groups.
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
    """The method ran, and its numbers are not those of the dense model."""


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
        raise Wrong(f"{n_adapted} of {n_expected} layers get an adapter")
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
    if isinstance(model, PeftModel):  # PEFT does not save mixed models
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            fresh = Speaker(base()) if isinstance(model.get_base_model(), Speaker) else base()
            with torch.no_grad():
                loaded = output_of(PeftModel.from_pretrained(fresh, folder).eval(), x)
        if distance(loaded, adapted_output) > SAME_OUTPUT:
            raise Wrong(f"after save and load the output differs by {distance(loaded, adapted_output):.0%}")
        done.append("save and load")
    return done + merging(model, reference, adapted_output, x)


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
        unloaded = model.merge_and_unload()(x)
    except Exception as error:
        return [f"merge {said(error)}"]
    for what, output in {"merge": merged, "unmerge": unmerged, "merge_and_unload": unloaded}.items():
        if distance(output, adapted_output) > SAME_OUTPUT:
            return [f"{what} is wrong: the output differs by {distance(output, adapted_output):.0%}"]
    return ["merge"]


def said(error: Exception) -> str:
    """Whether ``error`` was raised on purpose, with what message; else where it crashed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    package = next((name for name in ("peft_quantlayers", "peft", "hqq", "aqlm") if f"/{name}/" in frame.filename), "")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if package and (frame.line or "").lstrip().startswith("raise"):
        return f"refused: {first_line}"
    return f"crash: {type(error).__name__}: {first_line}"


def measured(base: Callable[[], nn.Module], make_config: Callable[[], Configs], x: Tensor) -> dict[str, str]:
    """``state`` is one of works, merge refused, merge crashes, merge wrong, refused, crash, wrong."""
    try:
        done = check(base, make_config, x)
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
    x = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(3))
    found = []
    for method, make_config in METHODS.items():
        if fnmatch.fnmatch(method, pattern):
            cells = {name: measured(base, make_config, x) for name, base in BASES.items()}
            found.append({"method": method, **cells})
            print(method, {name: cell["state"] for name, cell in cells.items()}, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="pattern of method names: measure these again, and keep the other rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = rows(args.only or "*")
    if args.only:
        again = {row["method"]: row for row in found}
        found = [again.get(row["method"], row) for row in json.loads(RESULT.read_text())["rows"]]
    RESULT.write_text(json.dumps({"device": describe_device(), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
