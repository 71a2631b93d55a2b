"""What reports and errors of the package say in Python, as options of the command line."""

from __future__ import annotations

import re

REPORT_FILE = "merge_report.json"
IN_OPTIONS = {
    r"""strategy=["'](\w+)["']""": r"--strategy \1",
    r"--strategy calibrated with some text": "--strategy calibrated --calibration.data FILE",
    r"train with peft_quantlayers\.enable_merge_aware": "train --merge_aware true",
    r"evaluate_on=held-out token ids": "--evaluate_on FILE",
    r"report\.table\(\) has all of them": f"{REPORT_FILE} has all of them",
    r"needs calibration=": "needs --calibration.data FILE",
    r"tune_epochs=(\d+)": r"--tune_epochs \1",
    r"with tune_epochs=": "with --tune_epochs",
    r"\bapproximate='(\w+)'": r"--approximate \1",
    r"\bformat='([\w-]+)'": r"--format \1",
    r"\baverage=([\d.]+)": r"--average_bits \1",
    r"\bsize='(\w+)'": r"--size \1",
    r"skip_modules=\['([^']*)'\]": r"--skip_modules [\1]",
    r"pass tokenizer= one": "give --tokenizer one",
    r"Train with LoraConfig\(use_qalora=True, qalora_group_size=<group_size>\)": "Train with --lora.use_qalora true "
    "--lora.qalora_group_size SIZE",
    r"\(peft_quantlayers\.merge_back, with another": "(peft-quantlayers merge, with another",
    r", or TrainingArguments\(fsdp_config=\{'version': 2\}\)": ", or train --fsdp_size N",
    r" \(AutoPeftModel takes quantization_config=\.\.\.\)": "",
}


def in_options(text: str) -> str:
    """``text`` with options in the place of arguments in Python."""
    for pattern, option in IN_OPTIONS.items():
        text = re.sub(pattern, option, text)
    return text
