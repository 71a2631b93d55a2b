"""Load a model in 4 bits and in mixed bits, and compare size and perplexity with the float model."""

from pathlib import Path

import torch
from demo_model import demo_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.evaluate import perplexity

folder = demo_model_folder()  # SmolLM2-135M-Instruct; any name on the model hub does as well
tokenizer = AutoTokenizer.from_pretrained(folder)
text = (Path(__file__).parent.parent / "benchmarks" / "data" / "wikitext2-test.txt").read_text(encoding="utf-8")
text_ids = torch.tensor(tokenizer(text[:10_000]).input_ids)

configs = {
    "float32": None,
    "4 bits": pql.HQQConfig(nbits=4),
    "4 bits, down_proj 8": pql.HQQConfig(nbits=4, overrides={"down_proj": {"nbits": 8}}),
}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    linears = [module for key, module in model.named_modules() if key.endswith("_proj")]
    size = sum(parameter.nbytes for linear in linears for parameter in linear.parameters()) / 1e6
    print(f"{name:21} linear layers {size:6.1f} MB   perplexity {perplexity(model, text_ids, max_windows=1):6.2f}")
