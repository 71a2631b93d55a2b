"""Install what `make wheel` built into an empty environment and use it: the wheel, and the sources without compiler.

    python tests/smoke_wheel.py dist

Not a test of `make test`: the environment gets its own torch, which takes minutes and a gigabyte.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# Quantizes, trains, merges and saves; prints whether the compiled kernels are there.
PROGRAM = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from quantlayers_kernels import native

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
model = pql.quantize_model(model, pql.HQQConfig(nbits=4), progress=False)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
ids = torch.arange(64)[None]
model(input_ids=ids, labels=ids).loss.backward()
merged, report = pql.merge_back(model, progress=False)
pql.save_model(merged, "merged")
assert torch.equal(LlamaForCausalLM.from_pretrained("merged")(ids).logits, merged(ids).logits)
print(pql.__version__, "compiled" if native.library() else "plain torch")
"""


def used(python: Path) -> str:
    """What the program prints at the end."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([str(python), "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    built = Path(sys.argv[1]).resolve()
    (wheel,), (sources,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch) / "environment"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*install, str(wheel)], check=True)
        said = used(python)
        helped = subprocess.run([str(python.with_name("pql")), "quantize", "--help"], capture_output=True, text=True)
        assert "--nbits" in helped.stdout, helped.stderr
        print(f"{wheel.name}: {said}")
        assert said.endswith("compiled"), said
        without_compiler = os.environ | {"CC": "/nonexistent/cc"}
        subprocess.run([*install, "--force-reinstall", "--no-deps", str(sources)], check=True, env=without_compiler)
        said = used(python)
        print(f"{sources.name}, no compiler: {said}")
        assert said.endswith("plain torch"), said


if __name__ == "__main__":
    main()
