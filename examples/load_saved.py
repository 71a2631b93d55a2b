"""The second process of ``demo.py``: load a saved model, save the logits of a prompt, print the continuation.

python examples/load_saved.py FOLDER PROMPT LOGITS_FILE
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers  # noqa: F401  transformers reads quantized models through it

folder, prompt, logits_file = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map=device).eval()

inputs = tokenizer(prompt, return_tensors="pt").to(device)
with torch.no_grad():
    logits = model(inputs.input_ids, use_cache=False).logits
save_file({"logits": logits.cpu().contiguous()}, logits_file)

written = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(written[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
