"""An encoder as a classifier: quantized to 4 bits, LoRA on it, merged."""

from sys import argv

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_quantlayers as pql

torch.manual_seed(0)
name = argv[1] if len(argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"
texts = [
    "The soup was cold.",
    "A lovely evening!",
    "We waited an hour.",
    "The best bread in town.",
    "Never again.",
    "So kind.",
]
labels = torch.tensor([0, 1, 0, 1, 0, 1])

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(
    name, num_labels=2, quantization_config=pql.HQQConfig(nbits=4)
)
print(pql.summary(model))

# The head is new, so it is trained whole, and saved with the adapter.
config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
model = get_peft_model(model, config)
batch = tokenizer(texts, padding=True, return_tensors="pt")
optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=5e-3)
for _ in range(15):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

merged, report = pql.merge_back(model.eval())
right = (merged(**batch).logits.argmax(-1) == labels).float().mean()
print(f"right after the merge: {right:.0%}")
pql.save_model(merged, "encoder-merged", tokenizer=tokenizer)
