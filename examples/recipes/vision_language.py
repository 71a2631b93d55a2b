"""A vision-language model: the language model in 4 bits, calibrated with images, LoRA on it, merged, saved."""

from sys import argv

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import peft_quantlayers as pql

torch.manual_seed(0)
name = argv[1] if len(argv) > 1 else "llava-hf/llava-interleave-qwen-0.5b-hf"
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name)

colours = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "white": (250, 250, 250)}
images = [Image.new("RGB", (64, 64), rgb) for rgb in colours.values()]
texts = [f"<image>\nWhich colour is it? {colour}" for colour in colours]
batch = processor(images=images, text=texts, padding=True, return_tensors="pt")

config = pql.HQQConfig(nbits=4, skip_modules=["vision_tower", "multi_modal_projector"])
model = pql.quantize_model(model, config, calibration=pql.Calibration(data=[dict(batch)]))
print(pql.summary(model))

model = get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
for step in range(3):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

merged, report = pql.merge_back(model)
pql.save_model(merged, "vision-merged")
processor.save_pretrained("vision-merged")
