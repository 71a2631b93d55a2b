"""Calibration data: what is taken, how it is cut, and what is refused."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from integrations.tiny import tiny_model
from torch import Tensor, nn

from peft_quantlayers import Calibration

MODEL = tiny_model()  # a vocabulary of 128


def letters(text: str) -> dict:
    return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(600) % 100,
        (torch.arange(600) % 100).view(6, 100),
        [i % 100 for i in range(600)],
        [torch.arange(300) % 100, (torch.arange(300, 600) % 100).tolist()],
        datasets.Dataset.from_dict({"input_ids": (torch.arange(600) % 100).view(6, 100).tolist()}),
        {"input_ids": torch.arange(600) % 100},
        [{"input_ids": [i % 100 for i in range(600)]}],
    ],
    ids=["ids", "rows", "list", "lists", "dataset", "encoding", "rows of a loader"],
)
def test_token_ids_of_every_kind_give_the_same_windows(data):
    batches = Calibration(data=data, n_tokens=600, sequence_length=60, batch_size=4).batches(MODEL)
    assert [tuple(batch.shape) for batch in batches] == [(4, 60), (4, 60), (2, 60)]
    assert torch.equal(torch.cat(batches).flatten(), torch.arange(600) % 100)


@pytest.mark.parametrize(
    "data",
    ["a text " * 100, ["a text " * 60, "  ", "a text " * 40], datasets.Dataset.from_dict({"text": ["a text " * 100]})],
    ids=["text", "texts", "dataset"],
)
def test_texts_go_through_the_tokenizer(data):
    ids = torch.cat(Calibration(data=data, tokenizer=letters, n_tokens=700, sequence_length=70).batches(MODEL))
    assert ids.shape == (10, 70)
    assert ids[0, :6].tolist() == [ord(letter) for letter in "a text"]


def test_windows_are_taken_from_all_of_the_data():
    ids = torch.cat(Calibration(data=torch.arange(1000) // 10, n_tokens=200, sequence_length=20).batches(MODEL))
    assert ids.shape == (10, 20)
    assert ids[0, 0] == 0
    assert ids[-1, -1] == 99


def test_windows_are_no_longer_than_the_positions_that_the_model_has():
    model = tiny_model()
    model.config.max_position_embeddings = 100
    batches = Calibration(data=torch.randint(0, 100, (4096,)), n_tokens=1000).batches(model)
    assert {batch.shape[1] for batch in batches} == {100}


def test_less_data_than_asked_for_is_used_and_said(caplog):
    batches = Calibration(data=torch.arange(200) % 100, n_tokens=5000, sequence_length=64).batches(MODEL)
    assert torch.cat(batches).shape == (3, 64)
    assert "192 tokens instead of 5000" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        (torch.arange(50), "50 tokens; at least 128"),
        (["short"], "5 tokens; at least 128"),
        (torch.arange(300), "vocabulary has 128"),
        (torch.full((300,), -1), "from -1"),
        (datasets.Dataset.from_dict({"question": ["a"]}), "'question'.*rename_column"),
        ({"foo": ["a text"]}, "entries \\['foo'\\]; it needs 'input_ids' or 'text'"),
        ([{"foo": [1]}, {"foo": [2]}], "rows with the entries \\['foo'\\]; it needs 'input_ids' or 'text'"),
        (torch.tensor(7), "single number"),
    ],
    ids=["empty", "few ids", "short text", "vocabulary", "negative", "columns", "entries", "rows", "number"],
)
def test_data_that_cannot_be_used_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Calibration(data=data, tokenizer=letters).batches(MODEL)


def test_inputs_of_a_model_without_a_vocabulary_must_be_finite():
    with pytest.raises(ValueError, match="NaN"):
        Calibration(data=[torch.full((2, 3), torch.nan)]).batches(torch.nn.Linear(3, 3))


@pytest.mark.parametrize(
    "data",
    [
        7,
        object(),
        [1.5, 2.5],
        [object()],
        torch.ones(300, dtype=torch.bool),
        torch.ones(300),
    ],
    ids=["number", "object", "floats", "objects", "bool", "float ids"],
)
def test_data_of_another_kind_is_a_type_error(data):
    with pytest.raises(TypeError, match="token ids"):
        Calibration(data=data).batches(MODEL)


@pytest.mark.parametrize("data", [["a", torch.arange(300) % 100], [{"input_ids": [1] * 200}, [1, 2]]])
def test_texts_rows_and_token_ids_in_one_list_are_refused_in_words(data):
    with pytest.raises(TypeError, match=r"all texts or all token ids, got a list with \['"):
        Calibration(data=data).batches(MODEL)


def test_texts_without_a_tokenizer_say_where_to_give_one():
    with pytest.raises(ValueError, match="tokenizer="):
        Calibration(data="a text " * 100).batches(MODEL)


@pytest.mark.parametrize(
    "field",
    [
        {"n_tokens": 3},
        {"damping": 0.0},
        {"shrinkage": 1.5},
        {"batch_size": 0},
        {"finetune_epochs": -1},
        {"learning_rate": 2.0},
        {"initial_codes": "actorder"},
    ],
)
def test_options_that_make_no_sense_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Calibration(data=[], **field)


class WithImages(nn.Module):
    """Takes as many images as the ids have places for them, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=5)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(("places", "n_parts"), [([1, 1], 2), ([2, 0], 1)])
def test_rows_are_split_only_where_each_has_its_images(places, n_parts):
    ids = torch.full((2, 64), 7)
    for row, n in enumerate(places):
        ids[row, :n] = 5
    batch = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 4, 4)}
    found = Calibration(data=[batch], batch_size=1).batches(WithImages())
    assert len(found) == n_parts
    assert torch.equal(torch.cat([part["input_ids"] for part in found]), ids)
