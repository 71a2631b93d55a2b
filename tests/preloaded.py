"""What the fork server of :mod:`programs` imports before the first program: what others wrote, and nothing of ours.

So a program may also test what an import of ours does, or do without it.
"""

# ruff: noqa: F401
import datasets
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # loaded when they are asked for
