"""What training the numbers beside the codes allocates: tiles, never a dense matrix."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from quantlayers_kernels import native, precision, tiled
from quantlayers_kernels.aqlm import aqlm_linear
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears
from quantlayers_kernels.hqq import hqq_linear

OUT, IN, TOKENS = 512, 1024, 24
DENSE_BYTES = 4 * OUT * IN


def layer(method: str, axis: int) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """What trains, scales and zeros or codebooks and scales, and the product."""
    if method == "hqq":
        W_q = pack(torch.randint(0, 16, (OUT, IN)).byte(), 4)
        shape = (OUT, IN // 64) if axis == 1 else (OUT // 64, IN)
        trained = [torch.rand(shape).add_(0.5).requires_grad_() for _ in range(2)]
        return trained, lambda x: hqq_linear(x, W_q, *trained, None, 4, axis)
    codes = torch.randint(-128, 128, (OUT, IN // 8, 2), dtype=torch.int8)
    trained = [torch.randn(2, 256, 1, 8, requires_grad=True), torch.rand(OUT, 1, 1, 1).requires_grad_()]
    return trained, lambda x: aqlm_linear(x, codes, *trained, None)


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "plain"])
# By hand: the kernels' operators.
@pytest.mark.parametrize(("method", "axis"), [("hqq", 1), ("hqq", 0), ("aqlm", 1)])
def test_training_scales_and_codebooks_allocates_nothing_dense(
    method, axis, is_compiled, monkeypatch, set_tile_elements
):
    set_tile_elements(32 * IN)
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    trained, linear = layer(method, axis)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients = torch.autograd.grad(linear(x).sum(), [x, *trained])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert 0 < max(event.self_cpu_memory_usage for event in profiled.events()) < DENSE_BYTES / 4


def test_tiles_are_used_again_by_the_next_product_also_after_inference_mode(monkeypatch):
    monkeypatch.setattr(tiled, "_SPARE", tiled._Spare())
    arguments = (pack(torch.randint(0, 16, (OUT, IN)).byte(), 4), torch.rand(OUT, 16), torch.rand(OUT, 16), None, 4, 1)
    x = torch.randn(TOKENS, IN)
    with torch.inference_mode():
        expected = hqq_linear(x, *arguments)
    (tile,) = tiled._SPARE.tiles[torch.float32]
    x.requires_grad_()
    y = hqq_linear(x, *arguments)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert [kept.data_ptr() for kept in tiled._SPARE.tiles[torch.float32]] == [tile.data_ptr()]


def test_a_tile_has_rows_enough_for_a_product_and_few_enough_for_a_cache():
    cpu = torch.device("cpu")
    assert tiled.rows_per_tile(10_000, 1024, cpu) == 1024
    assert tiled.rows_per_tile(10_000, 3584, cpu) == 288
    assert tiled.rows_per_tile(10_000, 28672, cpu) == 256
    assert tiled.rows_per_tile(10_000, 28672, cpu, multiple=24) == 240
    assert tiled.rows_per_tile(100, 28672, cpu) == 100
    assert tiled.rows_per_tile(100, 28672, cpu, multiple=200) == 200
    assert tiled.rows_per_tile(10_000, 28672, torch.device("meta")) == tiled.DEVICE_TILE_ELEMENTS // 28672


@pytest.mark.parametrize(("l2_mib", "elements"), [(50, tiled.CACHED_TILE_ELEMENTS), (6, tiled.DEVICE_TILE_ELEMENTS)])
def test_a_gpus_tile_fits_its_level_2_cache_or_is_a_whole_layer(l2_mib, elements, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=l2_mib << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tiled.device_tile_elements.cache_clear()
    assert tiled.rows_per_tile(1 << 20, 4096, torch.device("cuda", 0)) == elements // 4096
    tiled.device_tile_elements.cache_clear()


def test_a_larger_tile_takes_the_place_of_a_smaller_one_and_the_largest_are_not_kept(monkeypatch):
    monkeypatch.setattr(tiled, "_SPARE", tiled._Spare())
    cpu, dtype = torch.device("cpu"), torch.float32
    for rows, kept in ((8, tiled.CPU_TILE_ELEMENTS), (256, 256 * 8192), (4, 256 * 8192), (2000, 256 * 8192)):
        with tiled.scratch(rows, 8192, dtype=dtype, device=cpu) as tile:
            assert tile.shape == (rows, 8192)
        assert [spare.numel() for spare in tiled._SPARE.tiles[dtype]] == [kept]


def test_tiles_that_are_open_at_the_same_time_do_not_share_memory():
    gradients = tiled.weight_gradient_tiles(torch.randn(3, 40), torch.randn(3, 8))
    _, first = next(gradients)
    kept = first.clone()
    with tiled.scratch(40, 8, dtype=torch.float32, device=torch.device("cpu")) as other:
        other.zero_()
    assert torch.equal(first, kept)


def test_memory_of_an_interrupted_product_is_given_back(monkeypatch):
    monkeypatch.setattr(tiled, "_SPARE", tiled._Spare())
    tiles = tiled.weight_gradient_tiles(torch.randn(3, 40), torch.randn(3, 8))
    next(tiles)
    assert not tiled._SPARE.tiles[torch.float32]
    tiles.close()
    assert len(tiled._SPARE.tiles[torch.float32]) == 1


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_input_gradient_of_many_tiles_errs_as_one_product_does(dtype, n_layers, set_tile_elements, monkeypatch):
    monkeypatch.setattr(precision, "_is_faster_on_cpu", lambda dtype: True)
    set_tile_elements(8 * IN)
    weights = [torch.randn(OUT, IN).to(dtype) for _ in range(n_layers)]
    layers = [
        FrozenLinear(
            multiply=lambda x, weight=weight: x @ weight.t(),
            tiles=lambda dtype, weight=weight: tiled.row_tiles(weight),
            dtype=dtype,
            bias=None,
            branches=[],
        )
        for weight in weights
    ]
    x = torch.randn(TOKENS, IN).to(dtype).requires_grad_()
    grads = [torch.randn(TOKENS, OUT).to(dtype) for _ in weights]
    (found,) = torch.autograd.grad(lora_linears(x, layers), x, grads)
    alone = sum(tiled.input_gradient(g, tiled.row_tiles(w), IN, dtype) for g, w in zip(grads, weights, strict=True))
    plain = torch.cat(grads, 1) @ torch.cat(weights)
    truth = torch.cat(grads, 1).double() @ torch.cat(weights).double()
    for gradient in (found, alone):
        assert gradient.dtype == dtype
        assert (gradient.double() - truth).norm() <= 2 * (plain.double() - truth).norm()


@pytest.mark.parametrize("n_rows", [10, OUT + 1])
def test_a_gradient_with_other_rows_than_the_weight_is_refused(n_rows):
    hqq = (pack(torch.randint(0, 16, (OUT, IN)).byte(), 4), torch.rand(OUT, 16), torch.rand(OUT, 16), 4, 1)
    codes = torch.zeros(OUT, IN // 8, 2, dtype=torch.int8)
    aqlm = (codes, torch.randn(2, 256, 1, 8), torch.rand(OUT, 1, 1, 1))
    x, grad, grad_weight = torch.randn(3, IN), torch.randn(3, n_rows), torch.randn(n_rows, IN)
    # By hand: the kernels' operators.
    for method, weight in {"hqq": hqq, "aqlm": aqlm}.items():
        with pytest.raises(ValueError, match=f"that of {n_rows} outputs, and the weight has {OUT}"):
            getattr(torch.ops.quantlayers, f"{method}_metadata_gradient")(grad_weight, *weight)
        with pytest.raises(ValueError, match=f"that of {n_rows} outputs, and the weight has {OUT}"):
            getattr(torch.ops.quantlayers, f"{method}_linear_metadata_gradient")(grad, x, *weight)


def test_the_gradient_of_aqlms_scales_is_that_of_float32_under_autocast():
    codes = torch.randint(-128, 128, (OUT, IN // 8, 2), dtype=torch.int8)
    codebooks, scales = torch.randn(2, 256, 1, 8), torch.rand(OUT, 1, 1, 1).requires_grad_()
    y = aqlm_linear(torch.randn(40, IN), codes, codebooks, scales, None)
    weights = torch.randn(y.shape)
    (expected,) = torch.autograd.grad(y, scales, weights, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(y, scales, weights)
    torch.testing.assert_close(found, expected)
