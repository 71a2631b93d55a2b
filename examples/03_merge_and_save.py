"""Merge a trained adapter back into the quantized model, read what that lost, save the result, and load it."""

import tempfile
from pathlib import Path

from orders_task import OrderCollator, answer_loss, make_orders, tokenize
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import peft_quantlayers as pql
from peft_quantlayers.evaluate import demo_model_folder

folder = demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(folder)
train_orders, test_orders = make_orders(n_train=32, n_test=16)

# 8 bits: an adapter as small as this one would be lost in the coarser grid of 4 bits. The report shows it.
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=pql.HQQConfig(nbits=8))
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
with tempfile.TemporaryDirectory() as scratch:
    Trainer(
        model,
        TrainingArguments(
            output_dir=scratch,
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=tokenize(train_orders, tokenizer),
        data_collator=OrderCollator(tokenizer),
    ).train()
    print(f"loss with the adapter beside it: {answer_loss(model, tokenizer, test_orders):.3f}")

    merged, report = pql.merge_back(model)  # strategy="dense" gives a float model, which loses nothing
    worst = min(report.layers, key=lambda layer: layer.change_kept)
    print(f"part of the adapter's change that is in the merged weights: {report.change_kept:.3f}")
    print(f"least in {worst.name}: {worst.change_kept:.3f}")
    print(f"loss after merging:              {answer_loss(merged, tokenizer, test_orders):.3f}")

    pql.save_model(merged, Path(scratch) / "merged", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(Path(scratch) / "merged")
    print(f"saved and loaded:                {answer_loss(loaded, tokenizer, test_orders):.3f}")
