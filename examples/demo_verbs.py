"""The whole way by the command line: quantize, train, merge, evaluate, chat, report; each command is printed.

    python examples/demo_verbs.py                          SmolLM2-135M in 4 bits, a few minutes on a laptop
    python examples/demo_verbs.py --model NAME --nbits 3
    python examples/demo_verbs.py --export gguf            ends with a line of text from llama.cpp

The task is made by ``orders_task.py``; ``demo.yaml`` says how it is learned.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import orders_task
from demo_model import demo_model_folder
from export_demo import export_and_generate
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_quantlayers.cli import main as peft_quantlayers

BATCH_SIZE = 8
ON_YOUR_OWN = """
The same with another model and your own data (rows with prompt and completion, messages, or text):

  peft-quantlayers estimate NAME_OR_FOLDER --nbits 4
  peft-quantlayers quantize NAME_OR_FOLDER base --nbits 4
  peft-quantlayers train base tuned --data rows.jsonl --lora.r 16 --training.num_train_epochs 1
  peft-quantlayers merge tuned merged --evaluate_on held_out.txt
  peft-quantlayers export merged served --format gguf

peft-quantlayers VERB --help lists the options; demo-output/*/VERB.yaml hold those of this run.
This whole demo on it: python examples/demo_verbs.py --model NAME_OR_FOLDER --output OTHER_FOLDER"""


def verb(*arguments: object) -> None:
    """Run a verb in this process, which has imported all already; stop where it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ peft-quantlayers {shlex.join(words)}", flush=True)
    if exit_code := peft_quantlayers(words):
        sys.exit(exit_code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name on the model hub or local folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--nbits", type=int, default=4, help="bits per weight")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--orders", type=int, default=48, help="held-out orders to score")
    parser.add_argument("--export", help="format to export the merged model to, for example gguf")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all that is made")
    options = parser.parse_args()
    model, out = options.model or demo_model_folder(), options.output
    base, tuned, merged = (out / name for name in ("base", "tuned", "merged"))
    rows, held_out = out / "orders.jsonl", out / "held_out.txt"
    train, test = orders_task.make_orders(options.steps * BATCH_SIZE, options.orders)
    out.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"prompt": o.prompt, "completion": o.answer}) + "\n" for o in train))
    held_out.write_text("\n\n".join(o.prompt + o.answer for o in test))

    verb("quantize", model, base, "--nbits", options.nbits)
    settings = Path(__file__).with_name("demo.yaml")
    verb("train", settings, base, tuned, "--data", rows, "--training.max_steps", options.steps)
    verb("merge", tuned, merged, "--evaluate_on", held_out, "--evaluate_tokens", 2048)
    for folder in (base, merged):
        verb("evaluate", folder, "--text", held_out, "--n_tokens", 2048, "--window", 128)
    print("(Of prompts and answers: only answers were trained on, so it may rise. The score at the end is theirs.)")
    verb("chat", merged, "--prompt", test[0].prompt, "--max_new_tokens", 24)
    try:
        import matplotlib  # noqa: F401

        verb("report", tuned)
        verb("report", merged)
    except ImportError:
        print("\n(pip install 'peft_quantlayers[report]' for a page of plots: peft-quantlayers report FOLDER)")

    tokenizer = AutoTokenizer.from_pretrained(merged)
    right = orders_task.exact_match(AutoModelForCausalLM.from_pretrained(merged), tokenizer, test)
    print(f"\nmerged and loaded from {merged}: {right:.0%} of {len(test)} held-out orders right")
    if options.export:
        served = out / "served"
        print(f"\n$ peft-quantlayers export {merged} {served} --format {options.export}", flush=True)
        export_and_generate(merged, served, options.export, test[0].prompt)
    print(ON_YOUR_OWN)


if __name__ == "__main__":
    main()
