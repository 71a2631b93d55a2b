"""Writes what says which options there are, from their declarations in ``peft_quantlayers.cli``.

``quantlayers_cli/options.json``, of which help is made and wrong names are refused, and docs/cli.md, the reference.
"""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft_quantlayers.cli.work import verb_parser
from quantlayers_cli.main import VERBS, WITHOUT_OPTIONS
from quantlayers_cli.options import OPTIONS, description, listed, option_name

WIDTH = 108
# What every parser has by itself; and fields of other packages' classes, whose versions differ, and options of other
# verbs, which their own sections have.
OF_PARSER = ("-h", "--config", "--print_config")
GROUPS_OF_OTHERS = {"train": ["lora", "training", "merge_options", "evaluate_options", "export_options"]}
PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

`peft-quantlayers VERB [config.yaml] [--option value ...]`, also as `pql` and `python -m peft_quantlayers`. Every
option of a verb may stand in a YAML file, options on the line override it, groups are written with dots (`--lora.r
16`) or as nested mappings. Names that other trainers use are understood (`--model_name_or_path`, `--bits`,
`--lora_r`, `--output_dir`, `--micro_batch_size`), usual fields of `training` and `lora` without their group too
(`--learning_rate`, `--max_steps`), and unknown ones are refused with the nearest that there is. Positional arguments
fill in what a YAML file leaves open, or else override it in their order. Beside every output lies
`VERB.yaml` (beside a page of `report` a file of its name) with the resolved options and versions: the same verb takes
it again. `--dry_run` says what would be done and what it takes, and refuses what would fail at once; all verbs but
`estimate` have it. `--json` prints results for programs. Exit codes: 0 done, 1 it failed or found damage, 2 wrong
usage, 130 interrupted. Wrong usage is an unknown option, one that is missing, a value that is refused whatever the
files and the machine hold, or options that exclude each other.

```bash
pql quantize HuggingFaceTB/SmolLM2-135M-Instruct base --nbits 4
pql train base tuned --data chats.jsonl --lora.r 16 --training.num_train_epochs 1
pql merge tuned merged --strategy calibrated --calibration.data notes.txt --evaluate_on held_out.txt
pql export merged served --format mlx
pql report base --text held_out.txt
pql chat tuned --compare
```

The folder of an adapter stands for its base and itself in `merge`, `chat`, `evaluate`, `inspect` and `report`: `pql
chat tuned`, `pql evaluate tuned --text held_out.txt`. Trained on a float model, it holds the quantized base too
(`tuned/base`).

![The page that report writes on a model: a heat map of errors, the worst layers](report.png)

`train` takes also every field of PEFT's `LoraConfig` as `--lora.NAME`, every field of TRL's `SFTConfig` (`DPOConfig`
with `--trainer dpo`) as `--training.NAME`, and the options of `merge`, `evaluate` and `export` as
`--merge_options.NAME`, `--evaluate_options.NAME` and `--export_options.NAME`. This page is written by `python
benchmarks/cli_page.py`.
"""

OF_RUN = """Tried with models that this package has saved:

| program | |
|---|---|
| `trl sft`, `trl dpo` | trains and saves an adapter (`tests/cli/test_run.py`) |
| `accelerate launch` | processes that a program starts load them too (`tests/cli/test_train_distributed.py`) |
| `lm_eval` | scores (`tests/cli/test_lm_eval.py`) |
| `transformers serve`, `chat` | the answers of `pql chat` (same file; `pip install 'transformers[serving]'`) |

With SmolLM2-135M-Instruct at 4 bits in `base`, transformers 5.23 and fastapi 0.165:

```text
$ pql run transformers serve base --port 8123 --device cpu
INFO:     Uvicorn running on http://localhost:8123 (Press CTRL+C to quit)
$ curl localhost:8123/v1/chat/completions -H 'content-type: application/json' \\
  -d '{"model": "base", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}'
{..."message":{"content":"The capital of France is Paris.","role":"assistant"}}],..."usage":{"completion_tokens":8,...
$ pql run transformers chat base http://localhost:8123 max_new_tokens=16 do_sample=False
<base>:
The capital of France is Paris.
```

`transformers chat` takes a server on the same machine for the Hub: with `HF_HUB_OFFLINE=1` it stops. lm-eval 0.4.13,
on five questions in `tasks/capitals.yaml`, such as "The capital of Austria is", with five answers each:

```text
$ pql run lm_eval --model hf --model_args pretrained=base --device cpu --tasks capitals --include_path tasks
hf ({'pretrained': 'base'}), gen_kwargs: ({}), limit: None, num_fewshot: None, batch_size: 1
| Tasks  |Version|Filter|n-shot|Metric|   |Value|   |Stderr|
|--------|-------|------|-----:|------|---|----:|---|-----:|
|capitals|Yaml   |none  |     0|acc   |↑  |    1|±  |     0|
```
"""


def page() -> str:
    """The whole page, from the file of options."""
    parts = [HEAD]
    for verb, text in VERBS.items():
        if verb in WITHOUT_OPTIONS:
            parts.append(f"## {verb}\n\n{text[0].upper()}{text[1:]}: `peft-quantlayers {verb} --help`.\n")
            parts += [OF_RUN] if verb == "run" else []
        else:
            parts.append(f"## {verb}\n\n{description(verb)}\n\n```text\n{listed(verb, WIDTH)}\n```\n")
    return "\n".join(parts)


def declared() -> str:
    """What the file of options holds: each option of ours with its help, types and defaults in it, by verb."""
    return json.dumps({verb: _declared(verb) for verb in VERBS if verb not in WITHOUT_OPTIONS}, indent=1) + "\n"


def _declared(verb: str) -> dict[str, Any]:
    module = importlib.import_module(f"peft_quantlayers.cli.verbs.{verb}")
    parser = verb_parser(verb, module)
    with patch.dict(os.environ, COLUMNS="100000"):  # each help text in one line
        text = parser.format_help()
    ours = re.split(r"\n(?=\S)", text[text.index("options:\n") :])[0]
    options = dict(re.findall(r"^  (-.*?)(?:  +|\n +)(\S.*)$", ours, re.M))
    # Before Python 3.13 argparse names the value with each name of an option.
    options = {re.sub(r"^(\S+) (\S+), (\S+) \2$", r"\1, \3 \2", name): text for name, text in options.items()}
    given = {name: text for name, text in options.items() if name.split()[0].strip(",=") not in OF_PARSER}
    of_others = GROUPS_OF_OTHERS.get(verb, [])
    known = {option_name(name) for name in given}
    assert {name for name in parser.names() if name.split(".")[0] not in of_others} == known
    return {
        "description": module.DESCRIPTION,
        "positionals": module.POSITIONALS,
        "required": [option_name(name) for name, text in given.items() if "(required, " in text],
        "groups_of_others": of_others,
        "options": given,
    }


if __name__ == "__main__":
    OPTIONS.write_text(declared())
    PAGE.write_text(page())
