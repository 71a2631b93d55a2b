"""``quantize_embeddings``: which input embeddings and output heads become quantized, and that they share one copy."""

import copy
import pickle

import pytest
import torch
from _tiny_models import first_float, tiny_inputs, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MarianConfig, MarianMTModel

from peft_quantlayers import AQLMConfig, HQQConfig, HQQLinear, HQQSpec, dequantize_model, quantize_model
from peft_quantlayers.layers import LowRankBranch, QuantizedEmbedding, QuantizedLinear
from peft_quantlayers.layers.embedding import why_not_quantizable
from peft_quantlayers.layers.quantized_layers import quantized_embeddings, quantized_layers

CONFIG = HQQConfig(nbits=4, quantize_embeddings=8)
# Classes, and how many tables with the head among them hold one copy of the input embeddings.
MODELS = {
    "LlamaForCausalLM": 1,
    "Qwen3ForCausalLM": 1,
    "Gemma3ForCausalLM": 2,
    "GPT2LMHeadModel": 2,
    "OPTForCausalLM": 2,
    "T5ForConditionalGeneration": 4,
    "BartForConditionalGeneration": 4,
    "BertForMaskedLM": 2,
    "MixtralForCausalLM": 1,
    "LlavaForConditionalGeneration": 1,
}
SPEC = HQQSpec(nbits=8)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_float(model(**tiny_inputs(model)))


def tied_llama() -> nn.Module:
    model = tiny_model("LlamaForCausalLM")
    model.config.tie_word_embeddings = True
    model = type(model)(model.config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def quantize(model: nn.Module, config: HQQConfig = CONFIG) -> nn.Module:
    return quantize_model(model, config, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_head_are_quantized_and_share_what_they_shared(name):
    model = tiny_model(name)
    inputs, before = tiny_inputs(model), outputs(model)
    n_parameters = model.num_parameters()
    table = model.get_input_embeddings()
    dense, scale = table.weight.detach().clone(), getattr(table, "embed_scale", 1.0)
    quantize(model, HQQConfig(nbits=8, quantize_embeddings=8))
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(layer, QuantizedEmbedding)
    assert isinstance(layer, type(table))
    assert isinstance(head, HQQLinear)
    assert layer.spec == head.spec == SPEC
    assert len({id(each) for each in layer.sharing}) == (MODELS[name] if MODELS[name] > 1 else 0)
    assert (layer.codes is head.codes) == (MODELS[name] > 1)
    assert model.num_parameters() == n_parameters
    # The lookup is the dequantized row to the bit, scaled as the architecture scales it.
    ids = torch.tensor([[0, 5, 255], [7, 7, 1]])
    assert torch.equal(layer(ids), layer.dequantize()[ids] * scale)
    assert (layer.dequantize() - dense).abs().max() < 0.01 * dense.abs().max()
    x = torch.randn(3, head.in_features)
    product = x @ head.dequantize().T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(head(x), product)
    after = first_float(model(**inputs))
    assert (after - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("name", [name for name, n in MODELS.items() if n > 1])
def test_tying_again_and_dequantizing_keep_one_copy(name):
    model = tiny_model(name)
    tied = dict(model.all_tied_weights_keys)
    quantize(model)
    before = outputs(model)
    model.tie_weights()
    assert torch.equal(outputs(model), before)
    assert model.get_input_embeddings().codes is model.get_output_embeddings().codes
    dequantize_model(model)
    assert not quantized_layers(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.all_tied_weights_keys == tied
    model.tie_weights()
    torch.testing.assert_close(outputs(model), before, rtol=1e-3, atol=1e-3)


def test_a_table_of_any_linear_method_is_stored_with_hqq_and_as_wide_as_asked():
    config = AQLMConfig(num_codebooks=1, nbits_per_codebook=4, in_group_size=8, quantize_embeddings=4)
    model = quantize(tied_llama(), config)
    assert model.model.embed_tokens.spec == model.lm_head.spec == HQQSpec(nbits=4)
    assert model.model.layers[0].self_attn.q_proj.spec.method == "aqlm"


def test_a_head_of_its_own_is_left_to_quantize_lm_head_where_that_is_set():
    model = quantize(tiny_model("LlamaForCausalLM"), HQQConfig(nbits=4, quantize_embeddings=8, quantize_lm_head=True))
    assert (model.model.embed_tokens.spec.nbits, model.lm_head.spec.nbits) == (8, 4)


def test_a_write_to_one_reaches_all_and_keeps_the_other_rows():
    model = quantize(tied_llama())
    table, head = model.model.embed_tokens, model.lm_head
    codes = table.codes.clone()
    table.weight[3] = 0.5
    assert (table.codes != codes).any(1).nonzero().flatten().tolist() == [3]
    assert torch.equal(head.dequantize(), table.dequantize())
    table.weight.data += 1e9 * torch.eye(256, 64)  # scales that float16 cannot hold
    assert table.spec.scale_dtype == head.spec.scale_dtype == "float32"
    assert table.codes is head.codes
    assert table.scale is head.scale
    head.weight.data = torch.ones(256, 64)
    assert torch.equal(table.dequantize(), head.dequantize())
    torch.testing.assert_close(table.dequantize(), torch.ones(256, 64))


@pytest.mark.parametrize("n_rows", [300, 200])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "T5ForConditionalGeneration"])
def test_a_table_is_resized_and_its_rows_keep_their_codes(name, n_rows):
    model = quantize(tiny_model(name))
    codes, n_kept = model.get_input_embeddings().codes.clone(), min(n_rows, 256)
    model.resize_token_embeddings(n_rows)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, HQQLinear)
    assert table.num_embeddings == table.out_features == head.out_features == model.config.vocab_size == n_rows
    assert torch.equal(table.codes[:n_kept], codes[:n_kept])
    assert (table.codes is head.codes) == (MODELS[name] > 1)
    assert outputs(model).shape[-1] == n_rows
    if n_rows > 256:
        assert torch.isfinite(table(torch.tensor([299]))).all()


def test_copies_pickles_and_casts_are_the_same_layers():
    model = quantize(tiny_model("Gemma3ForCausalLM"))
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), expected)
        table, head = other.get_input_embeddings(), other.get_output_embeddings()
        assert table.codes is head.codes
        assert table.codes is not model.get_input_embeddings().codes
        assert table.sharing == (table, head)
    model.to(torch.bfloat16)
    table = model.get_input_embeddings()
    assert table(torch.tensor([1])).dtype == torch.bfloat16
    assert table.scale.dtype == torch.float16


def test_indices_outside_of_the_table_are_refused():
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 64), SPEC)
    for index in (10, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([index]))
    assert table(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 64)
    assert table(torch.tensor([[1]], dtype=torch.int32)).shape == (1, 1, 64)


def test_a_lookup_compiles_without_a_break(fresh_compiler):
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 64), SPEC)
    ids = torch.tensor([3, 1])
    assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(ids), table(ids))


class ReadsTheTable(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight * 2)


class AddsAVector(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.offset = nn.Parameter(torch.zeros(sizes[1]))

    def forward(self, ids):
        return super().forward(ids) + self.offset


@pytest.mark.parametrize("make", [ReadsTheTable, AddsAVector, lambda *sizes: nn.Embedding(*sizes, max_norm=1.0)])
def test_a_table_that_is_more_than_its_rows_stays_dense_and_is_named(make, caplog):
    model = tiny_model("LlamaForCausalLM")
    model.model.embed_tokens = make(256, 64)
    assert why_not_quantizable(model.model.embed_tokens)
    quantize(model)
    assert not quantized_embeddings(model)
    assert isinstance(model.lm_head, HQQLinear)
    assert "model.embed_tokens" in caplog.text
    assert "stay dense" in caplog.text


def test_what_skip_modules_names_stays_dense_with_all_that_shares_its_weight(caplog):
    model = quantize(tied_llama(), HQQConfig(nbits=4, quantize_embeddings=8, skip_modules=["lm_head"]))
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert "model.embed_tokens (skip_modules)" in caplog.text


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings"),
        # Whose vision tower gives a module with patches and positions as its input embeddings.
        ("Idefics3ForConditionalGeneration", "model.text_model.embed_tokens"),
    ],
)
def test_positions_and_token_types_stay_dense(name, table):
    assert list(quantized_embeddings(quantize(tiny_model(name)))) == [table]


def test_a_second_call_with_the_same_config_finds_nothing_to_do_and_another_is_refused():
    model = quantize(tied_llama())
    before = outputs(model)
    with pytest.raises(ValueError, match="all 16 layers are quantized already"):
        quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, HQQConfig(nbits=4))
    assert torch.equal(outputs(model), before)


def test_embeddings_are_added_where_an_interrupted_call_left_them_dense():
    model = quantize(tied_llama(), HQQConfig(nbits=4))
    quantize(model)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.lm_head.codes is model.model.embed_tokens.codes


def test_a_damaged_table_is_refused_before_anything_changes():
    model = tied_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.embed_tokens.*NaN"):
        quantize(model)
    assert not quantized_layers(model)


@pytest.mark.parametrize("bits", [5, True, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="quantize_embeddings"):
        HQQConfig(quantize_embeddings=bits)


def test_calibration_leaves_the_table_as_it_is_without():
    ids = torch.randint(0, 256, (2, 64))
    plain = quantize(tied_llama())
    torch.manual_seed(0)
    model = tied_llama()
    table = model.model.embed_tokens.weight.detach().clone()
    quantize_model(model, CONFIG, calibration=[ids[0], ids[1]], progress=False)
    expected = QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(table), SPEC)
    assert torch.equal(model.model.embed_tokens.codes, expected.codes)
    assert type(plain.model.embed_tokens) is type(model.model.embed_tokens)


@pytest.mark.parametrize("n_rows", [300, 200])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_resized_head_keeps_its_branch_its_rounding_and_its_hooks(n_rows, is_tied):
    model = quantize(tied_llama() if is_tied else tiny_model("LlamaForCausalLM"))
    head, seen, ids = model.lm_head, [], torch.arange(10)[None]
    head.add_branch(LowRankBranch(torch.randn(4, 64), torch.randn(256, 4)))
    head.activation_bits = 8
    head.register_forward_hook(lambda *arguments: seen.append(arguments))
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(n_rows)
        after = model(ids).logits
    assert after.shape[-1] == n_rows
    torch.testing.assert_close(after[..., :200], before[..., :200])
    assert model.lm_head.activation_bits == 8
    assert model.lm_head.branch.B.shape == (n_rows, 4)
    assert not model.lm_head.branch.B[256:].any()
    assert len(seen) == 2


def test_a_table_of_another_size_resizes_the_bias_of_a_head_that_shares_it():
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 64), SPEC)
    head = QuantizedLinear.from_weight(table.dequantize(), nn.Parameter(torch.ones(10)), SPEC)
    table.share_tensors([head])
    table.weight = torch.randn(30, 64)
    x = torch.randn(2, 64)
    assert head.bias.tolist() == [1.0] * 10 + [0.0] * 20
    with torch.no_grad():
        torch.testing.assert_close(head(x), x @ table.dequantize().T + head.bias)


def test_layers_that_stop_sharing_are_no_group_any_more():
    model = quantize(tied_llama())
    table, head = model.model.embed_tokens, model.lm_head
    head.unshare_parameters()
    assert len(table.sharing) == len(head.sharing) == 0
    rows = table.dequantize()
    head.weight[3] = 0.5
    assert torch.equal(table.dequantize(), rows)


def wide_llama() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))


def test_a_table_that_does_not_fit_is_refused_with_a_way_out_unless_it_is_skipped():
    fields = {"nbits": 4, "group_size": 32, "quantize_embeddings": 8, "on_misfit": "refuse"}
    with pytest.raises(ValueError, match=r"model\.embed_tokens: in_features=96 is not") as refused:
        quantize(wide_llama(), HQQConfig(**fields))
    assert "group_size that divides" not in str(refused.value)
    assert "skip_modules=['model.embed_tokens']" in str(refused.value)
    model = quantize(wide_llama(), HQQConfig(**fields, skip_modules=["embed_tokens"]))
    assert type(model.model.embed_tokens) is nn.Embedding
    assert quantized_embeddings(quantize(wide_llama(), HQQConfig(**fields | {"on_misfit": "shrink"})))


def marian() -> nn.Module:
    sizes = {"vocab_size": 100, "decoder_vocab_size": 100, "d_model": 64, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 128}
    return MarianMTModel(MarianConfig(**sizes, pad_token_id=99, decoder_start_token_id=99, eos_token_id=0)).eval()


@pytest.mark.parametrize("bits", [None, 8])
def test_a_model_that_declares_its_ties_itself_declares_them_as_before_once_it_is_dense(bits, tmp_path):
    model = marian()
    before = [(dict(vars(each)), each) for each in model.modules() if hasattr(each, "all_tied_weights_keys")]
    quantize(model, HQQConfig(nbits=4, quantize_embeddings=bits))
    dequantize_model(model)
    for attributes, each in before:
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            assert vars(each).get(name) == attributes.get(name)
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        found = MarianMTModel.from_pretrained(tmp_path)(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected)
