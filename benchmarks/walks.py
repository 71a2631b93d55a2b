"""Count the Python calls of one token, one merge and one load, and the files they go through.

Calls are those that ``sys.setprofile`` reports, after one run to fill the caches. A hop is a call in one of our files
that follows a call in another of them. Public API only, so that it also runs on older versions:

    PYTHONPATH=OLD:OLD/kernels python benchmarks/walks.py --json walks_before.json
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from _device import describe_device
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
import quantlayers_kernels

WIDTH, TOKENS = 576, 128
ROOMS = tuple(str(Path(package.__file__).parent) for package in (pql, quantlayers_kernels))
CONFIG = pql.HQQConfig(nbits=4, group_size=32)
IDS = torch.arange(1024) * 37 % 128

# What is done before, uncounted, and gives what is counted.
Journey = Callable[[], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One journey.

    Fields:
        calls: of Python functions, all threads.
        our_calls: those in ``peft_quantlayers`` and ``quantlayers_kernels``.
        our_files: how many of our files these lie in.
        hops: calls in one of our files that follow a call in another.
    """

    journey: str
    calls: int
    our_calls: int
    our_files: int
    hops: int


class Counter:
    """The profile function; one for all threads, with the last of our files for each."""

    def __init__(self) -> None:
        self.calls = self.our_calls = self.hops = 0
        self.files: set[str] = set()
        self._last = threading.local()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        self.calls += 1
        file = frame.f_code.co_filename
        if not file.startswith(ROOMS):
            return
        self.our_calls += 1
        self.files.add(file)
        last = getattr(self._last, "file", file)
        self.hops += last != file
        self._last.file = file


def counted(name: str, run: Callable[[], object]) -> Walk:
    """What ``run`` calls, on every thread that it starts."""
    counter = Counter()
    gc.collect()
    gc.disable()  # finalizers would be counted wherever they happen to run
    threading.setprofile(counter)
    sys.setprofile(counter)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()
    return Walk(
        journey=name,
        calls=counter.calls,
        our_calls=counter.our_calls,
        our_files=len(counter.files),
        hops=counter.hops,
    )


def bare_layer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(WIDTH, WIDTH, bias=False)))
    return pql.quantize_model(model, pql.HQQConfig(nbits=4), progress=False).layer.eval()


def lora_layer() -> nn.Module:
    model = nn.Sequential(OrderedDict(layer=bare_layer()))
    return with_lora(model, ["layer"]).base_model.model[0]


def with_lora(model: nn.Module, targets: list[str] | str) -> PeftModel:
    """An adapter whose delta is as small, relative to the weight, as that of a trained one."""
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)
    return peft_model


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).eval()


def lora_model() -> PeftModel:
    base = pql.quantize_model(llama(), CONFIG, progress=False)
    return with_lora(base, "all-linear")


def one_token() -> Callable[[], object]:
    return partial(bare_layer(), torch.randn(1, 1, WIDTH))


def one_token_with_lora() -> Callable[[], object]:
    return partial(lora_layer().eval(), torch.randn(1, 1, WIDTH))


def forward_with_lora() -> Callable[[], object]:
    return partial(lora_layer().train(), torch.randn(1, TOKENS, WIDTH, requires_grad=True))


def backward_with_lora() -> Callable[[], object]:
    layer, x = lora_layer().train(), torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    return layer(x).sum().backward


def quantize_one_layer() -> Callable[[], object]:
    torch.manual_seed(0)
    return partial(pql.QuantizedLinear.from_linear, nn.Linear(WIDTH, WIDTH), pql.HQQSpec(nbits=4))


def merge_one_layer() -> Callable[[], object]:
    return lora_layer().merge


def unmerge_one_layer() -> Callable[[], object]:
    layer = lora_layer()
    layer.merge()
    return layer.unmerge


def write_to_the_weight() -> Callable[[], object]:
    layer, delta = bare_layer(), torch.randn(WIDTH, WIDTH) * 1e-3
    return lambda: layer.weight.data.add_(delta)


def merge_back(**options: object) -> Journey:
    def prepare() -> Callable[[], object]:
        return partial(pql.merge_back, lora_model(), progress=False, **options)

    return prepare


def from_saved() -> Callable[[], object]:
    folder = tempfile.TemporaryDirectory()
    pql.quantize_model(llama(), CONFIG, progress=False).save_pretrained(folder.name)
    return partial(_loaded, folder)


def on_the_fly() -> Callable[[], object]:
    folder = tempfile.TemporaryDirectory()
    llama().save_pretrained(folder.name)
    return partial(_loaded, folder, quantization_config=copy.copy(CONFIG))


def _loaded(folder: tempfile.TemporaryDirectory, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder.name, **options)


CALIBRATION = pql.Calibration(data=IDS, n_tokens=512, sequence_length=64)
JOURNEYS: dict[str, Journey] = {
    "one token, bare HQQLinear": one_token,
    "one token, LoRA layer, no gradients": one_token_with_lora,
    f"{TOKENS} tokens, LoRA layer, forward with gradients": forward_with_lora,
    "its backward": backward_with_lora,
    "quantize one layer": quantize_one_layer,
    "LoRA layer .merge()": merge_one_layer,
    "LoRA layer .unmerge()": unmerge_one_layer,
    "layer.weight.data.add_": write_to_the_weight,
    "merge_back, auto, 14 layers": merge_back(),
    "merge_back, auto, evaluate_on one window, 14 layers": merge_back(evaluate_on=IDS[:256]),
    "merge_back, calibrated, 14 layers": merge_back(strategy="calibrated", calibration=CALIBRATION),
    "from_pretrained of a saved model, 14 layers": from_saved,
    "from_pretrained, quantizing on the fly, 14 layers": on_the_fly,
}


WITHOUT_GRADIENTS = ("one token, bare HQQLinear", "one token, LoRA layer, no gradients")


def walk(name: str) -> Walk:
    """The journey ``name``, taken once before."""
    with torch.set_grad_enabled(name not in WITHOUT_GRADIENTS):
        JOURNEYS[name]()()
        return counted(name, JOURNEYS[name]())


def commit_of(package: Path) -> str | None:
    """The commit that a package's folder is checked out at; None without git."""
    command = ["git", "-C", str(package.parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    walks = []
    print(f"{'':52} {'calls':>8} {'in ours':>8} {'files':>6} {'hops':>6}")
    for name in JOURNEYS:
        found = walk(name)
        walks.append(found)
        print(f"{name:52} {found.calls:8} {found.our_calls:8} {found.our_files:6} {found.hops:6}", flush=True)
    if options.json is not None:
        result = {
            "commit": commit_of(Path(pql.__file__).parent),
            "device": describe_device(),
            "walks": [asdict(found) for found in walks],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
