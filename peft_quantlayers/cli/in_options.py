"""What reports and errors of the package say in Python, as options of the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from ..merging.strategies import STRATEGIES
from ..methods import HQQConfig

REPORT_FILE = "merge_report.json"
# Strategies of merges, which messages name in quotes.
STRATEGY = "|".join(STRATEGIES)
IN_OPTIONS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"\(peft_quantlayers\.quantize_model\), or export it as \"dense\"": "(quantize MODEL OUTPUT), or give --format "
    "dense",
    r"Call peft_quantlayers\.enable_merge_aware\(model\) before training them": "Train with --merge_aware true",
    r"peft_quantlayers\.quantize_model(\(model, config\))?": "peft-quantlayers quantize",
    r"peft_quantlayers\.merge_back": "peft-quantlayers merge",
    r"peft_quantlayers\.verify_model\(folder\) lists": "peft-quantlayers inspect counts",
    r"peft_quantlayers\.dequantize_model": "peft-quantlayers export --format dense",
    r"pass overwrite=True": "give --overwrite",
    r"pass tokenizer=AutoTokenizer\.from_pretrained\(name\)": "give --tokenizer NAME",
    r"pass tokenizer=\.": "give --tokenizer FOLDER_OR_NAME.",
    r"HQQConfig\.for_export\('([\w-]+)'\)": lambda found: f"quantize {_grid_options(found[1])}",
    r"\bapproximate=\"(\w+)\"": r"--approximate \1",
    r"""strategy=["'](\w+)["']""": r"--strategy \1",
    r"--strategy calibrated with some text": "--strategy calibrated --calibration.data FILE",
    r"train with peft_quantlayers\.enable_merge_aware": "train --merge_aware true",
    r"evaluate_on=held-out token ids": "--evaluate_on FILE",
    r"report\.table\(\) has all of them": f"{REPORT_FILE} has all of them",
    r"BitPlan\.save writes them; make another with plan_bits": "The output of --average_bits or --size holds one, "
    "bit_plan.json",
    r"scratch: resume=False": "scratch: --resume false",
    r"needs calibration=": "needs --calibration.data FILE",
    r"tune_epochs=(\d+)": r"--tune_epochs \1",
    r"with tune_epochs=": "with --tune_epochs",
    r"\bapproximate='(\w+)'": r"--approximate \1",
    r"\bformat='([\w-]+)'": r"--format \1",
    r"\baverage=([\d.]+)": r"--average_bits \1",
    r"\bsize='(\w+)'": r"--size \1",
    r"skip_modules=\['([^']*)'\]": r"--skip_modules '[\1]'",
    r"pass tokenizer= one": "give --tokenizer one",
    r"Train with LoraConfig\(use_qalora=True, qalora_group_size=<group_size>\)": "Train with --lora.use_qalora true "
    "--lora.qalora_group_size SIZE",
    r"\b([Uu]se|or) \"(" + STRATEGY + r")\"": r"\1 --strategy \2",
    r"\"(" + STRATEGY + r")\" (holds|needs|loses|merges)": r"--strategy \1 \2",
    r"\(peft_quantlayers\.merge_back, with another": "(peft-quantlayers merge, with another",
    r", or TrainingArguments\(fsdp_config=\{'version': 2\}\)": ", or train --fsdp_size N",
    r"\"(" + STRATEGY + r")\" and \"(" + STRATEGY + r")\" do": r"--strategy \1 and --strategy \2 do",
    r" \(AutoPeftModel takes quantization_config=\.\.\.\)": "",
}


def in_options(text: str) -> str:
    """``text`` with options in the place of arguments in Python."""
    for pattern, option in IN_OPTIONS.items():
        text = re.sub(pattern, option, text)
    return text


def _grid_options(target: str) -> str:
    """The options of ``quantize`` for a model that an export format holds exactly."""
    config, plain = HQQConfig.for_export(target), HQQConfig()
    fields = [field.name for field in dataclasses.fields(config)]
    changed = [name for name in fields if getattr(config, name) != getattr(plain, name)]
    return " ".join(f"--{name} {str(getattr(config, name)).lower()}" for name in changed)
