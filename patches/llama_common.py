"""transformers' own tests of every model, on a small Llama.

Its source distribution has those tests, in `test_modeling_common.py`, and none of the models' test files that would
run them; `make patches` copies this one beside them.
"""

import unittest

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .test_modeling_common import ModelTesterMixin, ids_tensor


class Tester:
    """What the common tests ask of a model."""

    is_training = True
    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class LlamaCommonTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LlamaModel, LlamaForCausalLM)
    all_generative_model_classes = ()
    pipeline_model_mapping = {}

    def setUp(self) -> None:
        self.model_tester = Tester(self)
