"""Codes of more than 8 bits: bytes in memory, which process groups send; int16 in files, as published."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import in_processes, needs_gloo, run_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_quantlayers import AQLMConfig, AQLMSpec, quantize_model
from peft_quantlayers.layers import AQLMLinear, QuantizedLinear

# One codebook and three, so that the last dimension is odd too; codes of one byte, of 9 and of 16 bits.
SPECS = {
    "8 bits": AQLMSpec(num_codebooks=1, nbits_per_codebook=8, rounds=0),
    "9 bits": AQLMSpec(num_codebooks=3, nbits_per_codebook=9, rounds=0),
    "16 bits": AQLMSpec(num_codebooks=1, nbits_per_codebook=16, rounds=0),
}


def make_layer(bits: str, out_features: int = 24) -> QuantizedLinear:
    """A layer of random codes; searching for 16-bit codes would take minutes."""
    torch.manual_seed(0)
    spec = SPECS[bits]
    layer = QuantizedLinear.empty(
        spec, out_features=out_features, in_features=32, bias=True, compute_dtype=torch.float32, device="cpu"
    )
    size = 2**spec.nbits_per_codebook
    tensors = {
        "codes": spec.pack_codes(torch.randint(0, size, layer.quantized_weight.tensors["codes"].shape)),
        "codebooks": torch.randn(layer.codebooks.shape).half(),
        "scales": torch.rand(layer.scales.shape).half(),
    }
    layer.load_state_dict(tensors | {"bias": torch.randn(out_features)})
    return layer.requires_grad_(False)


@pytest.mark.parametrize("bits", SPECS)
def test_the_weight_has_the_dtype_of_the_layout_and_takes_no_more_memory(bits):
    layer = make_layer(bits)
    layout = layer.spec.tensor_layout(24, 32)
    codes = layer.quantized_weight.tensors["codes"]
    layer.quantized_weight.check("layer")
    assert (codes.dtype, codes.shape) == (layout["codes"].dtype, layout["codes"].shape)
    assert codes.data_ptr() == layer.codes.data_ptr()
    assert codes.nbytes == layer.codes.nbytes
    assert layer.codes.dtype in (torch.uint8, torch.int8)
    assert sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias") == 24 * 32


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: layer.to(torch.float64).float()],
    ids=["deepcopy", "pickle", "dtype there and back"],
)
def test_copies_and_conversions_keep_the_codes(bits, copied):
    layer, x = make_layer(bits), torch.randn(3, 32)
    expected = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), expected)
    assert other.quantized_weight.tensors["codes"].dtype == layer.spec.tensor_layout(24, 32)["codes"].dtype


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_state_is_loaded_in_either_form(as_file, assign):
    layer, other, x = make_layer("16 bits"), make_layer("16 bits"), torch.randn(3, 32)
    other.quantized_weight = other.quantized_weight.with_codes(other.quantized_weight.codes() * 0)
    assert not torch.equal(layer(x), other(x))
    state = layer.state_dict()
    if as_file:
        state |= layer.quantized_weight.tensors
        assert state["codes"].dtype == torch.int16
    other.load_state_dict(state, assign=assign)
    assert torch.equal(layer(x), other(x))
    assert other.codes.dtype == torch.uint8


def test_a_new_weight_and_compiled_code_work():
    layer, x = make_layer("9 bits"), torch.randn(3, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.weight = torch.randn(24, 32)
    assert layer.codes.dtype == torch.uint8
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("bits", [9, 8])
def test_files_hold_what_is_published_and_load_the_same(bits, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    quantize_model(model, AQLMConfig(num_codebooks=1, nbits_per_codebook=bits, rounds=0), progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = model.model.layers[0].mlp.up_proj
    stored = tensors["model.layers.0.mlp.up_proj.codes"]
    assert stored.dtype == (torch.int16 if bits == 9 else torch.int8)
    assert torch.equal(stored, layer.quantized_weight.tensors["codes"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[0].mlp.up_proj.codes.dtype == layer.codes.dtype
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)


# ---- in two processes


def trained_in_parallel(rank: int, bits: str) -> None:
    """DDP: rank 0's codes reach the others, and outputs and gradients are those of one process."""
    layer, x = make_layer(bits), torch.randn(4, 32)
    torch.manual_seed(1)
    model = get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    )
    expected = model(x)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base = model.base_model.model[0].base_layer
    assert isinstance(base, AQLMLinear)
    if rank:
        base.codes.data.zero_()
    y = nn.parallel.DistributedDataParallel(model)(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])


def sharded(rank: int, bits: str) -> None:
    """FSDP2: sharded by rows, the same outputs, and the same state once it is gathered."""
    layer, x = make_layer(bits, out_features=25), torch.randn(4, 32)
    expected, state = layer(x), layer.state_dict()
    model = nn.Sequential(layer)
    fully_shard(layer)
    fully_shard(model)
    assert torch.equal(model(x), expected)
    assert layer.codes.to_local().shape[0] == (13, 12)[rank]
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor.full_tensor(), state[name]), name


def run(rank: int) -> None:
    for bits in SPECS:
        trained_in_parallel(rank, bits)
        sharded(rank, bits)


@needs_gloo
def test_ddp_and_fsdp2_send_codes_of_any_width():
    run_file(__file__)


if __name__ == "__main__":
    in_processes(run)
