"""Train a LoRA adapter on a 4-bit model with the Trainer, save it, and load it again onto the 4-bit model."""

import tempfile

from demo_model import demo_model_folder
from orders_task import OrderCollator, answer_loss, make_orders, tokenize
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import peft_quantlayers as pql

set_seed(0)
folder = demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(folder)
train_orders, test_orders = make_orders(n_train=32, n_test=8)

model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=pql.HQQConfig(nbits=4))
print(f"loss before training: {answer_loss(model, tokenizer, test_orders):.3f}")

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
    print(f"after 8 steps:        {answer_loss(model, tokenizer, test_orders):.3f}")

    model.save_pretrained(scratch)  # the adapter alone, a few MB
    loaded = AutoPeftModelForCausalLM.from_pretrained(scratch, quantization_config=pql.HQQConfig(nbits=4))
    print(f"saved and loaded:     {answer_loss(loaded, tokenizer, test_orders):.3f}")
