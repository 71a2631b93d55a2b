"""Merge a trained adapter back into the quantized model, measure the loss, and save a form without any loss."""

import copy
import tempfile
from pathlib import Path

from demo_model import demo_model_folder
from orders_task import OrderCollator, answer_loss, make_orders, tokenize
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import peft_quantlayers as pql

set_seed(0)
folder = demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(folder)
train_orders, test_orders = make_orders(n_train=32, n_test=8)

model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=pql.HQQConfig(nbits=4))
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
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
    print(f"loss with the adapter:           {answer_loss(model, tokenizer, test_orders):.3f}")

    # At the same 4 bits: the delta is rounded to whole steps with dither, so that it is right on average.
    # With held-out tokens the report says how much of the adapter's effect is retained.
    held_out = [token for example in tokenize(test_orders, tokenizer) for token in example["input_ids"]]
    requantized, report = pql.merge_back(copy.deepcopy(model), evaluate_on=held_out)
    print(f"merged into 4 bits:              {answer_loss(requantized, tokenizer, test_orders):.3f}")
    print(report)  # the layers that lost most, the total, and capture; report.save(path) writes all of it

    # Or the same codes with the adapter as a low-rank branch, in one model that needs no PEFT.
    merged, _ = pql.merge_back(model, strategy="keep")
    print(f"kept as a low-rank branch:       {answer_loss(merged, tokenizer, test_orders):.3f}")

    pql.save_model(merged, Path(scratch) / "merged", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(Path(scratch) / "merged")
    print(f"saved and loaded:                {answer_loss(loaded, tokenizer, test_orders):.3f}")
