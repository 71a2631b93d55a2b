"""Writes docs/cli.md, the reference of the command line, from the declarations of its options."""

import importlib
import os
import re
from pathlib import Path

from peft_quantlayers.cli.main import VERBS, verb_parser

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

`peft-quantlayers VERB [config.yaml] [--option value ...]`, also as `pql` and `python -m peft_quantlayers`. Every
option of a verb may stand in a YAML file, options on the line override it, groups are written with dots (`--lora.r
16`) or as nested mappings. Names that other trainers use are understood (`--model_name_or_path`, `--bits`,
`--lora_r`, `--output_dir`), and unknown ones are refused with the nearest that there is. Beside every output lies
`VERB.yaml` with the resolved options and versions: the same verb takes it again. `--json` prints results for
programs. Exit codes: 0 done, 1 it failed or found damage, 2 wrong usage, 130 interrupted.

```bash
pql quantize HuggingFaceTB/SmolLM2-135M-Instruct base --nbits 4
pql train base tuned --data chats.jsonl --lora.r 16 --training.num_train_epochs 1
pql merge tuned merged --strategy calibrated --calibration.data notes.txt --evaluate_on held_out.txt
pql export merged served --format mlx
pql report base --text held_out.txt
pql chat base --adapter tuned --compare
```

![The page that report writes on a model: a heat map of errors, the worst layers](report.png)

`train` takes also every field of PEFT's `LoraConfig` as `--lora.NAME`, and every field of TRL's `SFTConfig`
(`DPOConfig` with `--trainer dpo`) as `--training.NAME`. This page is written by `python benchmarks/cli_page.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for verb, text in VERBS.items():
        if verb in ("run", "autoload"):
            parts.append(f"## {verb}\n\n{text.capitalize()}: `peft-quantlayers {verb} --help`.\n")
            continue
        module = importlib.import_module(f"peft_quantlayers.cli.verbs.{verb}")
        parts.append(f"## {verb}\n\n{module.DESCRIPTION}\n\n```text\n{options_of(verb, module)}\n```\n")
    return "\n".join(parts)


def options_of(verb: str, module: object) -> str:
    """Help on the options that are ours, at a width that does not depend on the terminal."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "110"
    try:
        text = verb_parser(verb, module).format_help()
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    ours = re.split(r"\n(?=\S)", text[text.index("options:") :])[0]
    without_common = re.sub(r"  (-h|--config|--print_config).*\n(?: {10}.*\n)*", "", ours)
    return without_common.removeprefix("options:\n").rstrip()


if __name__ == "__main__":
    PAGE.write_text(page())
