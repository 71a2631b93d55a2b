"""The benchmarks' dense models: what a quantizer's tensors are counted as, and that only weights differ."""

import json

import pytest
import torch
from _dense_models import MEASURED, linear_shapes, load_float, stored_bits_per_weight, write_dense
from _peers_rows import (
    ENCODER_SCORES,
    SCORES,
    of_calibration,
    other_processors,
    peers_rows,
    peers_versions,
    with_rows_from_elsewhere,
)
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES = {"a": torch.Size([8, 64]), "b": torch.Size([4, 32])}


def test_bits_are_counted_from_all_tensors_of_a_layer_but_its_bias():
    tensors = {"a.codes": torch.zeros(8, 32, dtype=torch.uint8), "b.codes": torch.zeros(4, 16, dtype=torch.uint8)}
    assert stored_bits_per_weight(tensors, SHAPES) == 4
    tensors |= {"a.scale": torch.zeros(8, 1, dtype=torch.float16), "b.part.scale": torch.zeros(4, 1)}
    assert stored_bits_per_weight(tensors, SHAPES) == 4 + 8 * (16 + 16) / 640
    tensors |= {"a.bias": torch.zeros(8), "norm.weight": torch.zeros(1000)}
    assert stored_bits_per_weight(tensors, SHAPES) == 4 + 8 * (16 + 16) / 640


@pytest.mark.parametrize(("order", "n_bytes"), [("in order", 0), ("by size", 4 * 64)])
def test_group_indices_are_counted_where_they_say_something(order, n_bytes):
    g_idx = torch.arange(64, dtype=torch.int32) // 16
    tensors = {
        "a.codes": torch.zeros(8, 32, dtype=torch.uint8),
        "a.g_idx": g_idx if order == "in order" else g_idx.flip(0),
    }
    assert stored_bits_per_weight(tensors, {"a": SHAPES["a"]}) == 4 + 8 * n_bytes / 512


def test_a_layer_without_stored_tensors_is_an_error():
    with pytest.raises(ValueError, match=r"nothing was saved for 'b'"):
        stored_bits_per_weight({"a.codes": torch.zeros(8, 32), "b.bias": torch.zeros(4)}, SHAPES)


@pytest.fixture(params=["decoder", "encoder"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "decoder":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **SIZES))
    else:
        model = BertModel(BertConfig(vocab_size=32, **SIZES))
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_a_dense_model_differs_in_what_was_replaced_only(folder, tmp_path):
    before = load_float(folder)
    name = next(iter(linear_shapes(before)))
    changed = before.get_submodule(name).weight.detach() * 2
    write_dense(folder, tmp_path / "made", {f"{name}.weight": changed.to(torch.bfloat16)}, {"bits": 4})
    after = load_float(tmp_path / "made").state_dict()
    assert torch.equal(after.pop(f"{name}.weight"), changed.to(torch.bfloat16).float())
    assert after
    assert all(torch.equal(tensor, before.state_dict()[each]) for each, tensor in after.items())
    assert json.loads((tmp_path / "made" / MEASURED).read_text()) == {"bits": 4}


def test_heads_and_poolers_stay_dense(folder):
    names = linear_shapes(load_float(folder))
    assert names
    assert not any("head" in name or "pooler" in name for name in names)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("nowhere.weight", torch.zeros(2, 2), "is no parameter"),
        (None, torch.zeros(3, 3), "is no parameter"),
        (None, torch.full((16, 16), float("nan")), "NaN"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_and_nothing_is_written(folder, tmp_path, name, tensor, message):
    name = name or f"{next(iter(linear_shapes(load_float(folder))))}.weight"
    with pytest.raises(ValueError, match=message):
        write_dense(folder, tmp_path / "made", {name: tensor}, {})
    assert not (tmp_path / "made").exists()


ROW = {"bits": 4, "group_size": 64, "bits_per_weight": 4.5, "cpu_s": 90.0, "peak_mib": 1234.0, "cpu": "A"}
ROW |= dict.fromkeys((*SCORES, *ENCODER_SCORES), 1.0)


def test_rows_are_in_the_order_of_the_second_texts_kl_and_say_who_read_no_text():
    worse = ROW | {"maker": "quanto", "kl_to_float_second_text": 2.0}
    found = peers_rows([worse, ROW | {"maker": "gptqmodel"}, ROW | {"maker": "ours", "bits": 8}], SCORES, "A")
    assert [cells[:3] for cells in found] == [
        ["8", "**ours**, HQQ calibrated, group 64", "4.50"],
        ["4", "GPTQModel, GPTQ, group 64", "4.50"],
        ["4", "optimum-quanto, no text", "4.50"],
    ]
    assert found[1][3:] == ["1.00", "1.000", "1.00", "1.000", "1.5", "1,234"]
    assert peers_rows([ROW | {"maker": "ours"}], ENCODER_SCORES, "A")[0][3:5] == ["1.0000", "1.0000"]


def test_our_rows_of_the_calibration_table_are_taken_where_both_texts_were_scored():
    named = ROW | {"name": "HQQ 3 bits, group 64, calibrated", "quantize_cpu_s": 60.0}
    others = [named | {"name": "HQQ 3 bits, group 64"}, {"name": "AQLM 2x8, calibrated", "quantize_cpu_s": 1.0}]
    (taken,) = of_calibration({"rows": [named, *others]})
    assert (taken["maker"], taken["bits"], taken["cpu_s"]) == ("ours", 3, 60.0)


def test_times_of_another_processor_are_marked_and_the_mark_is_explained():
    rows = [ROW | {"maker": "ours"}, ROW | {"maker": "ours", "bits": 3, "cpu": "B"}]
    assert [cells[-2] for cells in peers_rows(rows, SCORES, "A")] == ["1.5", "1.5 ¹"]
    assert other_processors(rows, "A") == " ¹ On B."
    assert other_processors(rows[:1], "A") == ""


def test_a_row_that_was_measured_beside_the_others_replaces_the_calibration_tables():
    here, there = ROW | {"maker": "ours", "cpu_s": 1.0}, ROW | {"maker": "ours", "cpu_s": 2.0}
    assert with_rows_from_elsewhere([here], [there, there | {"bits": 3}]) == [here, there | {"bits": 3}]


def test_versions_name_each_package_once():
    rows = [{"versions": {"gptqmodel": "7.7", "transformers": "5.23"}}] * 2
    rows += [{"versions": {"peft_quantlayers": "1", "transformers": "5.23"}}]
    assert peers_versions(rows) == "gptqmodel 7.7 (transformers 5.23)"
