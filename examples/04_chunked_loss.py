"""Train on long texts: the loss in chunks, so that the logits of all tokens are never in memory at once.

With a vocabulary of 49,152 the float32 logits of 1,024 tokens take 200 MB, and the ordinary loss needs several copies.
Here torch computes loss and gradients chunk by chunk (``torch.nn.functional.linear_cross_entropy``), and checkpointing
keeps the layers' activations low. On a GPU Liger's kernels do the same (``TrainingArguments(use_liger_kernel=True)``).
"""

import resource
import tempfile

import torch
from datasets import Dataset
from demo_model import demo_model_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import peft_quantlayers as pql

TOKENS = 512


class ChunkedLossTrainer(Trainer):
    """A ``Trainer`` for causal language models that goes from hidden states to the loss without all the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of a token, or, where the Trainer counts tokens over several batches, its share of it."""
        unwrapped = self.accelerator.unwrap_model(model).get_base_model()
        labels = inputs.pop("labels")
        hidden = unwrapped.model(**inputs, use_cache=False).last_hidden_state
        loss = torch.nn.functional.linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1),
            unwrapped.lm_head.weight.to(hidden.dtype),
            labels[:, 1:].flatten(),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        n_tokens = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum()
        return loss / n_tokens


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


set_seed(0)
model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), quantization_config=pql.HQQConfig(nbits=4))
model = pql.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
ids = torch.randint(0, model.config.vocab_size, (1, TOKENS)).tolist()
texts = Dataset.from_dict({"input_ids": ids, "labels": ids})
before = peak_mb()
for name, trainer_class in (("in chunks:", ChunkedLossTrainer), ("all at once:", Trainer)):
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=1,
            learning_rate=0.0,  # so that both losses are of the same model
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        loss = trainer_class(model, arguments, train_dataset=texts).train().training_loss
    print(f"{name:12} loss {loss:.4f}, peak {peak_mb() - before:.0f} MB above the model's")
