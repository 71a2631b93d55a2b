"""What the fork server of :mod:`programs` imports before the first program."""

# ruff: noqa: F401
import datasets
import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
)  # loaded when they are asked for

import peft_quantlayers
import peft_quantlayers.cli
