"""Layers that read one input, in one call of the kernel: the bits of each alone, whatever happens in between."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_quantlayers as pql
from peft_quantlayers import AQLMSpec, HQQSpec
from peft_quantlayers.layers import LowRankBranch, QuantizedLinear
from quantlayers_kernels import native
from quantlayers_kernels.prepared import PreparedProduct, PreparedProducts

pytestmark = pytest.mark.skipif(not native.is_available(), reason="only a compiled kernel computes several at once")

IN = 96
SPECS = {  # By hand: the methods with a compiled kernel for a few tokens.
    "hqq4": HQQSpec(nbits=4, group_size=32),
    "hqq3-float32": HQQSpec(nbits=3, group_size=None, scale_dtype="float32"),
    "hqq2-bfloat16": HQQSpec(nbits=2, group_size=16, scale_dtype="bfloat16"),
    "aqlm": AQLMSpec(num_codebooks=2, nbits_per_codebook=4, rounds=1),
    "aqlm-int16": AQLMSpec(num_codebooks=1, nbits_per_codebook=9, rounds=1),
}
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
ROWS = {"q": 40, "k": 13, "v": 24}  # whole blocks of rows, and not


class Attention(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(f"{name}_proj", layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


def attention(spec=SPECS["hqq4"], dtype=torch.float32, **other_specs) -> Attention:
    torch.manual_seed(0)
    layers = {
        name: QuantizedLinear.from_linear(
            nn.Linear(IN, rows, bias=name != "v", dtype=dtype), other_specs.get(name, spec), layer_name=name
        )
        for name, rows in ROWS.items()
    }
    return Attention(**layers).eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many weights each call of a prepared kernel read."""
    counted: list[int] = []

    def counting(kind, size):
        real = kind.__call__

        def call(self, *arguments):
            y = real(self, *arguments)
            counted.extend([] if y is None else [size(self)])
            return y

        monkeypatch.setattr(kind, "__call__", call)

    counting(PreparedProduct, lambda one: 1)
    counting(PreparedProducts, lambda several: len(several._members))
    return counted


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(y, truth) for y, truth in zip(found, expected, strict=True))


@EACH_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@torch.no_grad()
def test_all_are_computed_in_one_call_with_the_bits_of_each_alone(spec, dtype, n_threads, calls):
    model = attention(spec, dtype)
    inputs = [torch.randn(shape).to(dtype) for shape in ((IN,), (1, 1, IN), (2, 3, IN), (16, IN))]
    alone = [model(x) for x in inputs]
    assert pql.fuse_projections(model, in_inference=True) == [("q_proj", "k_proj", "v_proj")]
    calls.clear()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        for x, expected in zip(inputs, alone, strict=True):
            assert_equal(model(x), expected)
    finally:
        torch.set_num_threads(threads)
    assert calls == [3] * len(inputs)


@torch.no_grad()
def test_weights_of_other_layouts_are_computed_alone_and_other_metadata_is_none(calls):
    x = torch.randn(1, IN)
    mixed = attention(v=HQQSpec(nbits=3, group_size=32))
    same = attention(v=HQQSpec(nbits=4, group_size=32, scale_dtype="float32"))
    for model, n_weights in ((mixed, [1, 1, 1]), (same, [3]), (attention(v=SPECS["aqlm"]), [1, 1, 1])):
        alone = model(x)
        pql.fuse_projections(model, in_inference=True)
        calls.clear()
        assert_equal(model(x), alone)
        assert calls == n_weights


@torch.no_grad()
def test_rounded_inputs_go_together_too(calls):
    model, x = attention(), torch.randn(2, IN)
    pql.set_activation_bits(model, 8)
    alone = model(x)
    pql.fuse_projections(model, in_inference=True)
    calls.clear()
    assert_equal(model(x), alone)
    model.k_proj.train()  # where nothing is rounded
    exact = model.k_proj(x.clone())
    assert not torch.equal(exact, alone[1])
    calls.clear()
    assert_equal(model(x), [alone[0], exact, alone[2]])
    assert calls == [1, 1, 1]


def write_to_input(model, x):
    x.mul_(2)


def write_to_metadata(model, x):
    model.k_proj.scale.mul_(2)


def write_to_codes(model, x):
    model.k_proj.W_q.zero_()


def write_weight(model, x):
    model.k_proj.weight = torch.ones(ROWS["k"], IN)


def write_to_bias(model, x):
    model.k_proj.bias.add_(1)


def replace_bias(model, x):
    model.k_proj.bias = nn.Parameter(torch.ones(ROWS["k"]))


def replace_metadata(model, x):
    model.k_proj.scale.data = model.k_proj.scale * 2


def add_branch(model, x):
    model.k_proj.add_branch(LowRankBranch(torch.ones(1, IN), torch.ones(ROWS["k"], 1)))


def load(model, x):
    state = model.k_proj.state_dict()
    model.k_proj.load_state_dict(state | {"scale": state["scale"] * 2})


def round_activations(model, x):
    pql.set_activation_bits(model, 8)


def compute_in_bfloat16(model, x):
    model.k_proj.to(torch.bfloat16)


CHANGES = [write_to_input, write_to_metadata, write_to_codes, write_weight, write_to_bias, replace_bias]
CHANGES += [replace_metadata, add_branch, load, round_activations, compute_in_bfloat16]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_between_two_of_a_group_is_seen(change):
    model, x = attention(), torch.randn(1, IN)
    pql.fuse_projections(model, in_inference=True)
    before = model(x)[1]
    model.q_proj(x)
    change(model, x)
    y = model.k_proj(x)
    assert not torch.equal(y, before)
    pql.fuse_projections(model, (), in_inference=True)
    assert torch.equal(y, model.k_proj(x.clone()))


def test_inference_tensors_are_computed_alone(calls):
    model = attention()
    pql.fuse_projections(model, in_inference=True)
    with torch.inference_mode():
        model(torch.randn(1, IN))
    assert calls == [1, 1, 1]
    with torch.inference_mode():
        made_there = attention()
    calls.clear()
    pql.fuse_projections(made_there, in_inference=True)
    with torch.no_grad():
        made_there(torch.randn(1, IN))
    assert calls == [1, 1, 1]


@torch.no_grad()
def test_another_order_hooks_and_a_layer_called_twice(calls):
    model, x = attention(), torch.randn(1, IN)
    q, k, v = model.children()
    alone = [y.clone() for y in model(x)]
    pql.fuse_projections(model, in_inference=True)
    calls.clear()
    assert_equal([v(x), q(x), k(x)], [alone[2], alone[0], alone[1]])
    assert calls == [3]
    k.register_forward_hook(lambda module, given, y: y + 1)
    assert_equal(model(x), [alone[0], alone[1] + 1, alone[2]])
    assert_equal([q(x), q(x)], [alone[0], alone[0]])


@torch.no_grad()
def test_a_write_to_one_result_reaches_no_other():
    model, x = attention(), torch.randn(1, IN)
    pql.fuse_projections(model, in_inference=True)
    q, k, v = model(x)
    kept, version = [k.clone(), v.clone()], k._version
    q.zero_()
    assert_equal([k, v], kept)
    assert k._version == version


@torch.no_grad()
def test_two_threads_do_not_take_each_others_results():
    model = attention()
    inputs = [torch.randn(1, IN) for _ in range(2)]
    alone = [model(x) for x in inputs]
    pql.fuse_projections(model, in_inference=True)
    wrong, start = [], threading.Barrier(2)

    @torch.no_grad()
    def work(x, expected):
        start.wait()
        for _ in range(300):
            if not all(torch.equal(y, truth) for y, truth in zip(model(x), expected, strict=True)):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=each) for each in zip(inputs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_copies_are_not_fused_and_a_layer_that_was_taken_out_ends_it(calls):
    model, x = attention(), torch.randn(1, IN)
    pql.fuse_projections(model, in_inference=True)
    expected = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.shared_product is None for layer in made.children())
        assert_equal(made(x), expected)
    model.v_proj = nn.Identity()
    calls.clear()
    assert_equal(model(x)[:2], expected[:2])
    assert calls == [2]


@torch.no_grad()
def test_memory_that_moved_under_another_layer_is_not_read(calls):
    model, x = attention(), torch.randn(1, IN)
    pql.fuse_projections(model, in_inference=True)
    expected = model(x)
    for name in ("W_q", "scale"):
        model.k_proj.get_parameter(name).share_memory_()
        calls.clear()
        assert_equal(model(x.clone()), expected)
        assert calls == [3]


@torch.no_grad()
def test_a_shallow_copy_is_computed_alone(calls):
    model, x = attention(), torch.randn(1, IN)
    pql.fuse_projections(model, in_inference=True)
    expected = model(x)
    calls.clear()
    shallow = copy.copy(model.q_proj)  # as torch.nn.DataParallel makes its replicas
    assert torch.equal(shallow(x), expected[0])
    assert calls == [1]


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS = {  # By hand: attention with and without biases and norms of q and k, two names of a gated MLP, none.
    "Llama": (transformers.LlamaConfig(**SMALL), [3, 1, 2, 1]),
    "Qwen2": (transformers.Qwen2Config(**SMALL), [3, 1, 2, 1]),
    "Qwen3": (transformers.Qwen3Config(**SMALL, head_dim=16), [3, 1, 2, 1]),
    "Gemma3": (transformers.Gemma3TextConfig(**SMALL, head_dim=16), [3, 1, 2, 1]),
    "Phi3": (transformers.Phi3Config(**SMALL), [1, 1, 1, 1]),
    "OPT": (transformers.OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                                   vocab_size=300, word_embed_proj_dim=64, max_position_embeddings=64), [3, 1, 1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_generates_the_same_in_fewer_calls(name, with_adapters, calls):
    config, of_a_block = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=32), progress=False)
    if with_adapters:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).eval()

    def generated() -> Tensor:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        made = model.generate(
            input_ids=torch.tensor([[5, 6, 7]]), **options, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(made.logits)

    alone = generated()
    calls_alone = len(calls)
    pql.fuse_projections(model, in_inference=True)
    calls.clear()
    assert torch.equal(generated(), alone)
    assert sum(calls) == calls_alone
    assert sorted(calls) == sorted(of_a_block * 8)  # two blocks, the prompt and three tokens
