"""HQQ layers as the package stores them: described from headers alone, converted one tensor at a time.

Against the package itself: tests/interop/test_hqq_checkpoints.py.
"""

import pytest
import torch
from torch import Tensor

from peft_quantlayers.formats.checkpoint_format import TensorHeader
from peft_quantlayers.formats.published_hqq import PublishedHqqFormat, describe_hqq_layer
from peft_quantlayers.methods import HQQSpec, spec_from_dict
from quantlayers_kernels.bitpack import unpack

SHAPE = (64, 128)


def stored_layer(*, nbits: int = 8, axis: int = 1, group_size: int = 32, largest_code: int = 255) -> dict[str, Tensor]:
    """A layer of one code per byte, the entries as in a safetensors file."""
    n_groups = SHAPE[0] * SHAPE[1] // group_size
    groups, metadata = (
        ((n_groups, group_size), (n_groups, 1)) if axis == 1 else ((group_size, n_groups), (1, n_groups))
    )
    W_q = torch.randint(0, largest_code, groups, dtype=torch.uint8)
    W_q[-1, -1] = largest_code
    return {
        "W_q": W_q,
        "scale": torch.rand(metadata, dtype=torch.float16),
        "zero": torch.rand(metadata, dtype=torch.float16),
        "nbits": torch.tensor(nbits),
        "shape": torch.tensor(SHAPE),
        "axis": torch.tensor(axis),
        "packing": torch.tensor(list(b"8bit_u8"), dtype=torch.uint8),
    }


class Checkpoint:
    """Tensors with their headers, and a record of what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.headers = {
            name: TensorHeader(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()
        }
        self.was_read: list[str] = []

    def read(self, name: str) -> Tensor:
        self.was_read.append(name)
        return self.tensors[name]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("nbits", "largest_code", "expected"),
    [(8, 255, 8), (4, 15, 8), (5, 31, 5), (6, 63, 6), (5, 32, 8), (6, 64, 8)],
)
def test_the_spec_of_a_layer_is_known_before_it_is_read_but_for_five_and_six_bits(nbits, largest_code, expected, axis):
    layer = stored_layer(nbits=nbits, axis=axis, largest_code=largest_code)
    checkpoint = Checkpoint({f"a.b.{entry}": tensor for entry, tensor in layer.items()})
    description = PublishedHqqFormat().read({}, checkpoint, spec_from_dict=spec_from_dict)
    assert description.specs == {"a.b": HQQSpec(nbits=expected, group_size=32, axis=axis, scale_dtype="float16")}
    assert [name for name in checkpoint.was_read if name.endswith(("scale", "zero"))] == []
    assert ("a.b.W_q" in checkpoint.was_read) == (nbits in (5, 6))


@pytest.mark.parametrize(("axis", "group_size"), [(0, 32), (1, 32), (1, 256)])
def test_each_tensor_converts_by_itself_into_the_layout_of_the_spec(axis, group_size):
    stored = stored_layer(axis=axis, group_size=group_size)
    layer = describe_hqq_layer(stored, name="layer", spec_from_dict=spec_from_dict)
    spec = layer.spec
    assert spec.group_size == min(group_size, SHAPE[1])
    layout = spec.tensor_layout(*SHAPE)
    assert set(layer.tensor_names) == set(layout)
    converted = {name: layer.convert(name, stored[name]) for name in layer.tensor_names}
    for name, tensor in converted.items():
        assert (tuple(tensor.shape), tensor.dtype) == (layout[name].shape, layout[name].dtype)
    assert torch.equal(unpack(converted["W_q"], 8, SHAPE[1]), stored["W_q"].reshape(SHAPE))

    groups = stored["W_q"].double()
    expected = ((groups - stored["zero"].double()) * stored["scale"].double()).reshape(SHAPE)
    scale, zero = (  # with axis=0 the outputs of a group are n_groups rows apart
        converted[part].double().repeat_interleave(spec.group_size, 1)
        if axis == 1
        else converted[part].double().repeat(spec.group_size, 1)
        for part in ("scale", "zero")
    )
    found = (unpack(converted["W_q"], 8, SHAPE[1]).double() - zero) * scale
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_q": TensorHeader(shape=(3, 32), dtype=torch.uint8)}, r"layer\.W_q: expected torch\.uint8 of shape"),
        ({"W_q": TensorHeader(shape=(256, 32), dtype=None)}, r"layer\.W_q: expected torch\.uint8"),
        ({"W_q": TensorHeader(shape=(8192,), dtype=torch.uint8)}, r"layer\.W_q must be a matrix"),
        ({"scale": TensorHeader(shape=(256, 1), dtype=None)}, r"layer\.scale must be a floating tensor"),
        ({"zero": TensorHeader(shape=(255, 1), dtype=torch.float16)}, "layer: 256 scales and 255 zeros do not fit"),
    ],
)
def test_headers_that_contradict_the_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        describe_hqq_layer(stored_layer() | changes, name="layer", spec_from_dict=spec_from_dict)
