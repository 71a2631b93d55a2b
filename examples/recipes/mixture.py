"""A mixture of experts: everything in 4 bits, LoRA on attention and experts, merged, saved."""

from sys import argv

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

torch.manual_seed(0)
name = argv[1] if len(argv) > 1 else "Qwen/Qwen3-30B-A3B"
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=pql.HQQConfig(nbits=4))
print(pql.summary(model))

config = LoraConfig(
    r=8,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(pql.prepare_model_for_kbit_training(model), config)
tokens = torch.arange(3, 99)[None]  # in place of a text
optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
for step in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

merged, report = pql.merge_back(model)
print(report)
pql.save_model(merged, "mixture-merged")
