"""Block finetuning: which tensors of a layer are trained, and what is restored."""

import dataclasses

import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import tiny_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.calibration.trained_metadata import trained_metadata
from peft_quantlayers.layers.quantized_layers import quantized_layers


def quantized(config: pql.HQQConfig) -> tuple[nn.Module, list[nn.Module]]:
    model = pql.quantize_model(tiny_model(), config, progress=False)
    return model, list(quantized_layers(model).values())


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return all(now[key].dtype == value.dtype and torch.equal(now[key], value) for key, value in before.items())


@all_methods
def test_floating_metadata_is_trained_in_float32_and_stored_as_the_spec_says(method):
    model, layers = quantized(quick_config(method))
    before = stored(model)
    with trained_metadata(model, layers) as trained:
        assert {parameter.dtype for parameter in trained.parameters} == {torch.float32}
        assert sum(p.requires_grad for p in model.parameters()) == len(trained.parameters) > 0
        for parameter in trained.parameters:
            parameter.data *= 1.5
        trained.keep()
    assert not same(model, before)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == {k: t.dtype for k, t in before.items()}
    codes = [key for key, tensor in before.items() if not tensor.is_floating_point()]
    assert codes
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in codes)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_not_kept_or_fails_is_as_before(dtype):
    model, layers = quantized(pql.HQQConfig(nbits=3, group_size=16, scale_dtype=dtype))
    before, tensors = stored(model), [layer.scale.data for layer in layers]
    values = [tensor.clone() for tensor in tensors]
    with trained_metadata(model, layers) as trained:
        trained.parameters[0].data *= 2
    assert same(model, before)

    def fails_late() -> None:
        with trained_metadata(model, layers) as trained:
            trained.parameters[0].data *= 2
            trained.keep()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails_late()
    assert same(model, before)
    with trained_metadata(model, layers) as trained:
        trained.parameters[0].data *= 2
        trained.keep()
    assert not same(model, before)
    # The tensors that an unmerge would restore are never written to, in float32 either.
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, values, strict=True))


@pytest.mark.parametrize("fields", [{"integer_zero": True}, {"symmetric": True}])
def test_whole_zeros_stay_whole(fields):
    config = pql.HQQConfig(nbits=4, group_size=16, **fields)
    data = pql.Calibration(
        data=torch.randint(3, 128, (8, 40), generator=torch.Generator().manual_seed(0)),
        n_tokens=320,
        sequence_length=40,
        finetune_epochs=2,
        learning_rate=1e-2,
    )
    plain = pql.quantize_model(
        tiny_model(), config, calibration=dataclasses.replace(data, finetune_epochs=0), progress=False
    )
    tuned = pql.quantize_model(tiny_model(), config, calibration=data, progress=False)
    layers = quantized_layers(tuned).values()
    assert any(
        not torch.equal(one.scale, other.scale)
        for one, other in zip(layers, quantized_layers(plain).values(), strict=True)
    )
    for layer in layers:
        zeros = layer.quantized_weight.tensors.get("zero")
        assert zeros is None or torch.equal(zeros, zeros.round())


def test_a_value_that_the_dtype_cannot_hold_is_refused_with_the_name_of_the_layer():
    model, layers = quantized(pql.HQQConfig(nbits=3, group_size=16))
    before = stored(model)

    def overflows() -> None:
        with trained_metadata(model, layers) as trained:
            trained.parameters[0].data.fill_(1e6)
            trained.keep()

    with pytest.raises(ValueError, match=r"q_proj: torch.float16 cannot hold"):
        overflows()
    assert same(model, before)
