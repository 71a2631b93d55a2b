"""Everything that a GPU does differently: kernels, streams, compiled graphs, and that it agrees with the CPU.

``QUANTLAYERS_TEST_DEVICE=cpu`` runs what a CPU can of it, which tests the tests.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from every_method import METHODS, methods_for, quick_config
from integrations.tiny import tiny_model, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.merging.strategies import STRATEGIES
from quantlayers_kernels import cache_folder, gpu, gpu_tuning
from quantlayers_kernels.aqlm import aqlm_dequantize, aqlm_linear
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import hqq_dequantize, hqq_linear
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

DEVICE = os.environ.get("QUANTLAYERS_TEST_DEVICE", "cuda")
IS_GPU = DEVICE != "cpu"
OUT, IN, GROUP_SIZE = 272, 4096, 64
# One token, few on one and on several tiles of the tensor cores, and those that are left to cuBLAS.
TOKENS = (1, 2, 16, 64, 200)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("toy_method"),
    pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="there is no GPU"),
]
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="only a GPU can tell")


def hqq_weight(nbits: int, metadata_dtype: torch.dtype = torch.float16, group_size: int = GROUP_SIZE):
    codes = torch.randint(0, 2**nbits, (OUT, IN), dtype=torch.uint8)
    scale = (0.01 + 0.1 * torch.rand(OUT, IN // group_size)).to(metadata_dtype)
    zero = ((2**nbits - 1) * torch.rand(scale.shape)).to(metadata_dtype)
    return tuple(part.to(DEVICE) for part in (pack(codes, nbits), scale, zero))


def aqlm_weight(num_codebooks: int, nbits: int, out_group: int, in_group: int):
    code_type = torch.int8 if nbits <= 8 else torch.int16
    limits = torch.iinfo(code_type)
    shape = (OUT // out_group, IN // in_group, num_codebooks)
    codes = torch.randint(limits.min, limits.max + 1, shape).to(code_type)
    codebooks = torch.randn(num_codebooks, 2**nbits, out_group, in_group).half()
    return tuple(part.to(DEVICE) for part in (codes, codebooks, (0.5 + torch.rand(shape[0], 1, 1, 1)).half()))


def assert_as_exact_as_dense(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> None:
    """Against float64, the error of ``y`` is at most twice that of the dense product in the dtype of ``x``."""
    truth = F.linear(x.double(), dense.double(), bias.double())
    plain = F.linear(x, dense.to(x.dtype), bias.to(x.dtype))
    assert y.dtype == x.dtype
    assert y.shape == truth.shape
    assert torch.isfinite(y).all()
    assert (y.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + 1.2e-7 * truth.norm()


@needs_gpu
def test_the_triton_kernels_are_what_is_tested():
    assert gpu.is_available()


HQQ_CASES = [
    *((nbits, torch.float16, torch.float16, GROUP_SIZE) for nbits in (1, 2, 3, 4, 8)),
    (4, torch.bfloat16, torch.float32, GROUP_SIZE),
    (4, torch.float32, torch.float16, GROUP_SIZE),
    (4, torch.float16, torch.float16, 8),
    (3, torch.bfloat16, torch.bfloat16, IN),
]


@pytest.mark.parametrize(("nbits", "dtype", "metadata_dtype", "group_size"), HQQ_CASES, ids=str)
def test_hqq_products_and_dense_rows_are_those_of_the_reference(nbits, dtype, metadata_dtype, group_size):
    weight = hqq_weight(nbits, metadata_dtype, group_size)
    dense = dequantize_hqq_reference(*weight, nbits=nbits, axis=1, in_features=IN)
    assert torch.equal(hqq_dequantize(*weight, nbits, 1, IN, dtype), dense.to(dtype))
    bias = torch.randn(OUT, device=DEVICE)
    for n_tokens in TOKENS:
        x = torch.randn(n_tokens, IN, device=DEVICE).to(dtype)
        assert_as_exact_as_dense(hqq_linear(x, *weight, bias, nbits, 1), x, dense, bias)


AQLM_CASES = [
    ((2, 8, 1, 8), torch.float16), ((1, 16, 1, 8), torch.float16), ((1, 16, 1, 8), torch.bfloat16),
    ((8, 8, 1, 32), torch.float16), ((1, 8, 2, 4), torch.float16), ((2, 8, 1, 8), torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "dtype"), AQLM_CASES, ids=str)
def test_aqlm_products_and_dense_rows_are_those_of_the_reference(scheme, dtype):
    weight = aqlm_weight(*scheme)
    dense = dequantize_aqlm_reference(*weight)
    assert torch.equal(aqlm_dequantize(*weight, dtype), dense.to(dtype))
    bias = torch.randn(OUT, device=DEVICE)
    for n_tokens in TOKENS:
        x = torch.randn(n_tokens, IN, device=DEVICE).to(dtype)
        assert_as_exact_as_dense(aqlm_linear(x, *weight, bias), x, dense, bias)


def test_other_shapes_fall_back_where_they_must_and_are_right():
    """Groups that no vector divides, rows whose last byte is not full, groups along the outputs."""
    for nbits, axis, (out_features, in_features, n_groups) in [
        (4, 1, (7, 100, 4)), (3, 1, (5, 63, 3)), (4, 0, (6, 63, 3)), (2, 1, (1, 1, 1)), (5, 1, (9, 128, 4)),
    ]:  # fmt: skip
        codes = torch.randint(0, 2**nbits, (out_features, in_features), dtype=torch.uint8)
        shape = (out_features, n_groups) if axis == 1 else (n_groups, in_features)
        weight = [part.to(DEVICE) for part in (pack(codes, nbits), torch.rand(shape) + 0.1, torch.rand(shape))]
        dense = dequantize_hqq_reference(*weight, nbits=nbits, axis=axis, in_features=in_features)
        for n_tokens in (0, 1, 3):
            x = torch.randn(n_tokens, in_features, device=DEVICE)
            y = hqq_linear(x, *weight, None, nbits, axis)
            torch.testing.assert_close(y, F.linear(x, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 200])
def test_gradients_are_those_of_the_cpu(n_tokens):
    def gradients(operator, weight, device):
        codes, *floats = (part.to(device) for part in weight)
        leaves = [part.float().detach().requires_grad_() for part in (x.to(device), *floats, bias.to(device))]
        y = operator(leaves[0], codes, *leaves[1:])
        return [part.cpu() for part in torch.autograd.grad(y, leaves, grad.to(device))]

    x, bias, grad = torch.randn(n_tokens, IN), torch.randn(OUT), torch.randn(n_tokens, OUT)
    for operator, weight in (
        (lambda *arguments: hqq_linear(*arguments, 4, 1), hqq_weight(4)),
        (aqlm_linear, aqlm_weight(2, 8, 1, 8)),
    ):
        for here, there in zip(gradients(operator, weight, DEVICE), gradients(operator, weight, "cpu"), strict=True):
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3 * there.abs().max().item())


def quantized_layers(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    linear = nn.Linear(1024, 256).to(DEVICE, dtype)
    # By hand: the methods with kernels of their own.
    configs = (pql.HQQConfig(nbits=4), pql.HQQConfig(nbits=3), pql.AQLMConfig(rounds=0, beam=1))
    return [pql.quantize_model(nn.Sequential(copy.deepcopy(linear)), config, progress=False) for config in configs]


@needs_gpu
def test_neither_a_forward_nor_a_backward_pass_waits_for_the_gpu():
    for layer in quantized_layers(torch.bfloat16):
        for n_tokens in (1, 8, 300):
            x = torch.randn(n_tokens, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            layer(x).sum().backward()  # compiles the kernels
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_product_can_be_captured_in_a_cuda_graph():
    for layer in quantized_layers(torch.float16):
        for n_tokens in (1, 8, 300):
            x = torch.randn(n_tokens, 1024, device=DEVICE, dtype=torch.float16)
            with torch.no_grad():
                layer(x)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = layer(x)
                x.copy_(torch.randn_like(x))
                graph.replay()
                torch.testing.assert_close(y, layer(x))


@needs_gpu
def test_the_forms_of_products_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(cache_folder.VARIABLE, str(tmp_path))
    monkeypatch.setenv(gpu_tuning.SWITCH, "on")
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    for layer in quantized_layers(torch.float16):
        for n_tokens in (1, 8):
            x = torch.randn(n_tokens, 1024, device=DEVICE, dtype=torch.float16)
            first = layer(x)
            assert torch.equal(layer(x), first)
    known = gpu_tuning.chosen()
    assert {key.split()[1] for key in known} == {"one_token", "few_tokens"}
    monkeypatch.setattr(gpu_tuning, "_chosen", {})
    monkeypatch.setattr(gpu_tuning, "_seconds", None)
    assert torch.equal(layer(x), first)
    assert gpu_tuning.chosen().items() <= known.items()


def test_a_compiled_layer_is_one_graph():
    for layer in quantized_layers(torch.bfloat16):
        x = torch.randn(4, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if IS_GPU else "aot_eager")
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(result.sum(), x)[0] for result in (y, expected)]
        torch.testing.assert_close(*grads)


def test_quantizing_gives_the_codes_of_the_cpu():
    """Up to roundings of sums, which decide where a value lies between two codes."""
    weight = torch.randn(256, 512) / 20
    for config in (pql.HQQConfig(nbits=4), pql.HQQConfig(nbits=2, group_size=32)):
        here, there = (
            pql.quantize_model(_sequential(weight, device), config, progress=False)[0].dequantize(torch.float32).cpu()
            for device in (DEVICE, "cpu")
        )
        errors = [(quantized - weight).norm() / weight.norm() for quantized in (here, there)]
        assert errors[0] == pytest.approx(errors[1].item(), rel=1e-3)
        assert (here - there).norm() < 0.02 * weight.norm()


def test_aqlm_quantizing_is_as_good_as_on_the_cpu():
    weight = torch.randn(64, 256) / 20
    config = pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=6)
    errors = []
    for device in (DEVICE, "cpu"):
        quantized = pql.quantize_model(_sequential(weight, device), config, progress=False)[0]
        errors.append(((quantized.dequantize(torch.float32).cpu() - weight).norm() / weight.norm()).item())
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def _sequential(weight: torch.Tensor, device: str) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return nn.Sequential(linear).to(device)


def adapted_model(config: pql.QuantConfig, device: str, **fields: object) -> nn.Module:
    """A tiny model, quantized on the CPU, with an adapter on ``device``; the same numbers for each device."""
    model = pql.quantize_model(tiny_model(), config, progress=False)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields)
    return get_peft_model(model, lora).to(device)


CONFIGS = {name: quick_config(name) for name in METHODS} | {"hqq": pql.HQQConfig(nbits=4, group_size=32)}
# "auto" is one of the others, and "dense" leaves no quantized weight.
QUANTIZED = tuple(name for name in STRATEGIES if name not in ("auto", "dense"))


@pytest.mark.parametrize("is_fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_gives_the_loss_and_the_gradients_of_the_cpu(config, is_fused):
    found = []
    for device in (DEVICE, "cpu"):
        model, ids = adapted_model(config, device).train(), token_ids().to(device)
        if is_fused and device == DEVICE:
            pql.fuse_projections(model)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, rtol=1e-2, atol=1e-3 * grad.abs().max().item())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_lowers_the_loss(config):
    model, ids = adapted_model(config, DEVICE).to(torch.bfloat16).train(), token_ids().to(DEVICE)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(16):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("strategy", "method"), [(strategy, method) for strategy in QUANTIZED for method in methods_for(strategy)]
)
def test_merging_agrees_with_the_cpu(strategy, method):
    config = CONFIGS[method]
    fields = {"use_qalora": True, "qalora_group_size": 32} if strategy == "exact" else {}
    data = {"calibration": token_ids().repeat(1, 40), "progress": False} if strategy == "calibrated" else {}
    weights, reports = [], []
    for device in (DEVICE, "cpu"):
        model = adapted_model(config, device, **fields)
        if strategy == "aware":
            pql.enable_merge_aware(model)
        merged, report = pql.merge_back(model, strategy=strategy, evaluate_on=token_ids()[0], **data)
        modules = pql.quantized_modules(merged)
        weights.append({name: module.dequantize(torch.float32).cpu() for name, module in modules.items()})
        reports.append(report)
    assert weights[0].keys() == weights[1].keys() != set()
    assert reports[0].delta_retained == pytest.approx(reports[1].delta_retained, abs=0.02)
    assert reports[0].capture.capture == pytest.approx(reports[1].capture.capture, abs=0.03)
    if (
        config.max_code is not None and strategy != "calibrated"
    ):  # a near choice that goes the other way moves a code by one step
        for name, there in weights[1].items():
            assert (weights[0][name] - there).norm() < 0.02 * there.norm(), name


def test_a_model_moves_between_the_cpu_and_the_gpu_without_a_change():
    model = pql.quantize_model(tiny_model(), CONFIGS["hqq"], progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(token_ids()).logits
    there = model.to(DEVICE)(token_ids().to(DEVICE)).logits.cpu()
    torch.testing.assert_close(there, logits, rtol=1e-3, atol=1e-3)
    for name, tensor in model.cpu().state_dict().items():
        assert torch.equal(tensor, before[name])
