"""Layers that round their inputs to 8 bits: which do, when, and what it costs."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.evaluate.divergence import divergence
from quantlayers_kernels import native
from quantlayers_kernels.hqq import cpu
from quantlayers_kernels.prepared import PreparedProduct

if not native.is_available():
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128}
SMALL |= {"tie_word_embeddings": False}
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SMALL),
    "Qwen2": transformers.Qwen2Config(**SMALL),
    "GPT2": transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=300, n_positions=128, tie_word_embeddings=False
    ),
    "Phi3": transformers.Phi3Config(**SMALL, pad_token_id=0),
}


def tiny(config=CONFIGS["Llama"], quantization=None) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # logits as far apart as those of a trained model
        model.get_output_embeddings().weight.mul_(3 / model(torch.arange(100)[None]).logits.std())
    return pql.quantize_model(model, quantization or pql.HQQConfig(nbits=4, group_size=64))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that were called."""
    names, run, prepared = [], native.call, PreparedProduct.__call__

    def call_prepared(self, *arguments):
        y = prepared(self, *arguments)
        names.extend([] if y is None else [self._function.__name__])
        return y

    monkeypatch.setattr(native, "call", lambda name, *arguments: (names.append(name), run(name, *arguments)))
    monkeypatch.setattr(PreparedProduct, "__call__", call_prepared)
    return names


@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_are_close_to_the_exact_ones_and_back_again_they_are_those(name):
    model = tiny(CONFIGS[name])
    exact, text = copy.deepcopy(model), torch.randint(0, 300, (256,))
    done = pql.set_activation_bits(model, 8)
    assert (done.bits, done.exact) == (8, {})
    assert set(done.layers) == set(pql.quantized_modules(model))
    assert all(layer.activation_bits == 8 for layer in pql.quantized_modules(model).values())
    found = divergence(model, exact, text, window=32, progress=False)
    assert 1e-7 < found.kl < 2e-3
    with torch.no_grad():
        for layer in pql.quantized_modules(model).values():
            layer.scale.mul_(1.05)  # an error that must not pass
    assert divergence(model, exact, text, window=32, progress=False).kl > 2e-3
    model.load_state_dict(exact.state_dict())
    assert pql.set_activation_bits(model, None).bits is None
    assert all(layer.activation_bits is None for layer in pql.quantized_modules(model).values())
    assert torch.equal(model(text[None, :64]).logits, exact(text[None, :64]).logits)


def test_generation_uses_it_and_what_wants_gradients_or_compiles_does_not(calls):
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    pql.set_activation_bits(model, 8)
    calls.clear()
    model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert set(calls) == {"ql_hqq_linear_int8"}
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 128)

    def kernels_of(call) -> set[str]:
        calls.clear()
        call()
        return set(calls)

    with torch.no_grad():
        assert kernels_of(lambda: layer(x)) == {"ql_hqq_linear_int8"}
        assert kernels_of(lambda: layer.train()(x)) == {"ql_hqq_linear"}
        assert kernels_of(lambda: layer.eval()(x)) == {"ql_hqq_linear_int8"}
    assert kernels_of(lambda: layer(x)) == {"ql_hqq_linear_int8"}
    assert kernels_of(lambda: layer(x.clone().requires_grad_())) == {"ql_hqq_linear"}
    with torch.no_grad():  # in the way that is faster for as many tokens
        assert kernels_of(lambda: layer(torch.randn(cpu.MAX_ROUNDED_TOKENS, 128))) == {"ql_hqq_linear_int8"}
        assert kernels_of(lambda: layer(torch.randn(cpu.MAX_ROUNDED_TOKENS + 1, 128))) == {"ql_hqq_dequantize"}
    assert kernels_of(lambda: layer.train()(x)) == {"ql_hqq_linear"}
    layer.eval()
    with torch.no_grad():
        assert kernels_of(lambda: layer(x.clone().requires_grad_())) == {"ql_hqq_linear_int8"}
        assert kernels_of(lambda: torch.compile(layer, backend="eager", fullgraph=True)(x)) == {"ql_hqq_linear"}
        assert kernels_of(lambda: layer(torch.randn(0, 128))).isdisjoint({"ql_hqq_linear_int8"})


def test_training_on_a_model_that_rounds_is_that_of_one_that_does_not():
    from peft import LoraConfig, get_peft_model

    losses = []
    for bits in (None, 8):
        model = tiny()
        pql.set_activation_bits(model, bits)
        torch.manual_seed(1)
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        peft_model.train()
        ids = torch.arange(40)[None]
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad for p in peft_model.parameters() if p.grad is not None]
        losses.append([loss, *gradients])
        with torch.no_grad():
            losses[-1].append(peft_model(input_ids=ids).logits)  # still in training mode
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_beside_an_adapter_the_base_rounds(calls):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    assert len(pql.set_activation_bits(model, 8).layers) == len(pql.quantized_modules(model))
    calls.clear()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert set(calls) == {"ql_hqq_linear_int8"}


def test_layers_that_are_computed_together_round_too_but_not_for_a_gradient(calls):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    pql.set_activation_bits(model, 8)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = model(input_ids=tokens).logits
        pql.fuse_projections(model, in_inference=True)
        calls.clear()
        together = model(input_ids=tokens).logits
    assert set(calls) == {"ql_hqq_linear_int8"}
    assert torch.equal(together, alone)
    calls.clear()
    model(input_ids=tokens)
    assert set(calls) == {"ql_hqq_linear"}


def test_a_quantized_head_rounds_and_an_embedding_has_nothing_to_round(calls):
    model = tiny(
        transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True}), pql.HQQConfig(quantize_embeddings=8)
    )
    done = pql.set_activation_bits(model, 8)
    assert "lm_head" in done.layers
    assert not done.exact
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls.count("ql_hqq_linear_int8") == len(done.layers)


def test_it_is_copied_and_pickled_but_not_saved(tmp_path):
    model = tiny()
    state = set(model.state_dict())
    pql.set_activation_bits(model, 8)
    assert set(model.state_dict()) == state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.activation_bits == 8 for layer in pql.quantized_modules(other).values())
    buffer = io.BytesIO()
    torch.save(model.model.layers[0].mlp.up_proj, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).activation_bits == 8
    model.save_pretrained(tmp_path)
    assert "activation_bits" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(layer.activation_bits is None for layer in pql.quantized_modules(loaded).values())


def test_layers_that_cannot_are_named_with_the_reason(caplog):
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = pql.QuantizedLinear.from_linear(nn.Linear(128, 192), pql.HQQSpec(nbits=4, axis=0, group_size=64))
    mlp.gate_proj = pql.QuantizedLinear.from_linear(nn.Linear(128, 192), pql.NF4Spec())
    done = pql.set_activation_bits(model, 8)
    assert {name: "axis=0" in reason for name, reason in done.exact.items()} == {
        "model.layers.1.mlp.gate_proj": False,
        "model.layers.1.mlp.up_proj": True,
    }
    assert mlp.up_proj.activation_bits is mlp.gate_proj.activation_bits is None
    assert "2 of 14 quantized layers stay exact" in caplog.text
    assert "nf4" in caplog.text
    model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("bits", [4, 16, True, "8", 8.0, 0])
def test_other_numbers_of_bits_are_refused_with_those_that_there_are(bits):
    model = tiny()
    with pytest.raises(ValueError, match=r"bits=.* is not supported.*\(8, None\)"):
        pql.set_activation_bits(model, bits)
    assert all(layer.activation_bits is None for layer in pql.quantized_modules(model).values())


def test_a_model_in_which_nothing_can_round_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"it has no quantized layers\. Quantize with HQQ"):
        pql.set_activation_bits(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match=r"axis=0.*The model was not changed"):
        pql.set_activation_bits(tiny(quantization=pql.HQQConfig(nbits=4, axis=0)), 8)
    with pytest.raises(TypeError, match="set_activation_bits"):
        pql.set_activation_bits("model", 8)
    model = tiny()
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match="compiled CPU kernels are not in use"):
        pql.set_activation_bits(model, 8)
    assert pql.set_activation_bits(model, None).layers == ()


def test_8_bit_metadata_and_fixed_zero_points_round_too(calls):
    for fields in ({"double_quant": True}, {"symmetric": True}, {"integer_zero": True}):
        layer = pql.QuantizedLinear.from_linear(
            nn.Linear(512, 64), pql.HQQSpec(nbits=4, group_size=64, **fields)
        ).eval()
        pql.set_activation_bits(layer, 8)
        x = torch.randn(3, 512)
        calls.clear()
        with torch.no_grad():
            y, exact = layer(x), x @ layer.dequantize().t() + layer.bias
        assert calls[0] == "ql_hqq_linear_int8"
        assert 1e-4 < (y - exact).norm() / exact.norm() < 0.02


def test_where_the_library_goes_away_the_layer_stays_exact(monkeypatch):
    """A model that was pickled where there are kernels, and loaded where there are none."""
    layer = pql.QuantizedLinear.from_linear(nn.Linear(128, 64), pql.HQQSpec(nbits=4)).eval()
    pql.set_activation_bits(layer, 8)
    assert cpu.can_use_few_tokens(
        torch.ones(1, 128), layer.W_q, layer.scale, layer.zero, None, nbits=4, axis=1, activation_bits=8
    )
    monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.dequantize().t() + layer.bias)


def test_an_embedding_table_is_no_layer_that_could_round_its_inputs(caplog):
    model = tiny(quantization=pql.HQQConfig(nbits=4, quantize_embeddings=8))
    report = pql.set_activation_bits(model, 8)
    assert report.exact == {}
    assert "lm_head" in report.layers
    assert not caplog.text
