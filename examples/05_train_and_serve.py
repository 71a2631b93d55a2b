"""What is trained is what is served: quantize onto llama.cpp's grid, train through its rounding, merge, export."""

import tempfile
from pathlib import Path

from demo_model import demo_model_folder
from export_demo import text_from_llama_cpp
from llama_cpp_converter import ensure_converter
from orders_task import OrderCollator, answer_loss, make_orders, tokenize
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import peft_quantlayers as pql

set_seed(0)
folder = demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(folder)
train_orders, test_orders = make_orders(n_train=32, n_test=8)

# Groups of 32 are llama.cpp's blocks of 4 bits with a scale and a minimum each (Q4_1).
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=pql.HQQConfig(nbits=4, group_size=32))
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
pql.enable_merge_aware(model)  # from now on the model computes what the merged one will
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
    print(f"loss in training:          {answer_loss(model, tokenizer, test_orders):.3f}")
    merged, _ = pql.merge_back(model, strategy="aware")
    print(f"loss of the merged model:  {answer_loss(merged, tokenizer, test_orders):.3f}")

    ensure_converter()  # llama.cpp's own; it knows its metadata, names and tokenizers
    report = pql.export(merged, Path(scratch) / "served", "gguf", tokenizer=tokenizer)
    print(report)
    prompt = test_orders[0].prompt
    print(f"llama.cpp goes on with:    {text_from_llama_cpp(Path(scratch) / 'served' / 'model.gguf', prompt)!r}")
