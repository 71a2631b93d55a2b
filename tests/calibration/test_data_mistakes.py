"""Calibration data of the wrong kind is refused with the way out; files, chats, splits and loaders are read."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from calibration.other_models import ids, llava, t5, whisper
from mistakes import CONFIG, IDS, Tokenizer, assert_refused, calibrated_with, dense, letters, mistake, short_bert

import peft_quantlayers as pql
from peft_quantlayers import Calibration

CALIBRATION = [
    mistake(
        lambda _: Calibration(data=IDS, tokens=10), TypeError, "did you mean 'n_tokens'?", "batch_size", name="field"
    ),
    mistake(
        lambda _: Calibration(data=IDS, seq_len=10), TypeError, "sequence_length", name="field of another library"
    ),
    mistake(lambda _: Calibration(IDS), TypeError, "Calibration(data=...)", name="without keyword"),
    mistake(lambda _: Calibration(data=None), TypeError, "data=None", "texts", name="none"),
    mistake(
        lambda _: Calibration(data=IDS, n_tokens="many"),
        TypeError,
        "n_tokens must be an integer",
        name="text as number",
    ),
    mistake(
        lambda _: Calibration(data=IDS, batch_size=2.0),
        TypeError,
        "batch_size must be an integer",
        name="float as integer",
    ),
    mistake(
        lambda _: Calibration(data=IDS, damping=True), TypeError, "damping must be a number", name="flag as number"
    ),
    mistake(lambda _: Calibration(data=IDS, tokenizer="gpt2"), TypeError, "from_pretrained('gpt2')", name="tokenizer"),
    mistake(
        lambda _: Calibration(data=IDS, resume_folder=3),
        TypeError,
        "resume_folder must be the path",
        name="resume folder",
    ),
    mistake(calibrated_with(__file__), ValueError, "path of a file", "pathlib.Path(", on=dense, name="path as text"),
    mistake(calibrated_with([__file__]), ValueError, "path of a file", on=dense, name="list of paths as texts"),
    mistake(
        calibrated_with(Path("/no/such/file.txt"), tokenizer=letters),
        ValueError,
        "is not a file",
        on=dense,
        name="missing file",
    ),
    mistake(
        lambda model: pql.quantize_model(
            model,
            CONFIG,
            calibration=datasets.DatasetDict(
                {
                    "validation": datasets.Dataset.from_dict({"text": ["a"]}),
                    "test": datasets.Dataset.from_dict({"text": ["a"]}),
                }
            ),
        ),
        ValueError,
        "splits ['validation', 'test']",
        "data['validation']",
        on=dense,
        name="splits without train",
    ),
    mistake(
        calibrated_with(datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})),
        ValueError,
        "['question', 'answer']",
        "'messages'",
        "rename_column",
        on=dense,
        name="columns",
    ),
    mistake(
        calibrated_with([{"messages": [{"role": "user", "content": "a" * 200}]}], tokenizer=Tokenizer()),
        ValueError,
        "chat template",
        "chat_template",
        on=dense,
        name="chats without a template",
    ),
    mistake(calibrated_with({1, 2, 3}), TypeError, "texts, token ids", on=dense, name="set"),
    mistake(calibrated_with(b"text" * 100), TypeError, "texts, token ids", on=dense, name="bytes"),
    mistake(calibrated_with(np.ones(300)), TypeError, "integers", on=dense, name="array of floats"),
    mistake(
        calibrated_with([IDS, {"input_ids": ids(), "attention_mask": torch.zeros_like(ids())}]),
        TypeError,
        "batches must all be mappings",
        on=dense,
        name="batches and ids",
    ),
    mistake(
        calibrated_with({"input_ids": ids(), "pixel_value": torch.ones(4, 3, 8, 8)}),
        ValueError,
        "did you mean 'pixel_values'?",
        on=llava,
        name="keyword's typo",
    ),
    mistake(
        calibrated_with({"input_ids": ids(), "pixel_values": torch.full((4, 3, 16, 16), torch.nan)}),
        ValueError,
        "pixel_values",
        "NaN",
        on=llava,
        name="NaN",
    ),
    mistake(
        calibrated_with({"input_ids": ids(), "pixel_values": torch.ones(4, 3, 16, 16)}),
        ValueError,
        "LlavaForConditionalGeneration does not run on the calibration data (input_ids, pixel_values)",
        "Nothing was changed",
        on=llava,
        name="images without their tokens",
    ),
    mistake(
        calibrated_with(
            torch.utils.data.DataLoader(list(zip(torch.ones(8, 3, 4), range(8), strict=True)), batch_size=2)
        ),
        TypeError,
        "collate_fn",
        on=dense,
        name="loader of tuples",
    ),
    mistake(calibrated_with(IDS), TypeError, "'input_features'", "processor", on=whisper, name="ids for speech"),
    mistake(
        calibrated_with({"input_features": torch.ones(2, 8, 60)}),
        ValueError,
        "'decoder_input_ids' or 'labels'",
        on=whisper,
        name="speech without a text",
    ),
    mistake(calibrated_with([torch.ones(2, 8)]), TypeError, "token ids", on=t5, name="floats for text"),
    mistake(
        calibrated_with({"input_ids": ids(2, 40), "attention_mask": torch.arange(40).expand(2, 40) % 2}),
        ValueError,
        "positions for 16",
        "truncation=True",
        on=short_bert,
        name="too long",
    ),
]


@pytest.mark.parametrize(("on", "call", "error", "words"), CALIBRATION)
def test_a_mistake_is_refused_with_the_way_out_and_changes_nothing(on, call, error, words):
    assert_refused(on, call, error, words)


def test_a_texts_path_a_chat_and_a_split_are_read(tmp_path):
    model = dense()
    file = tmp_path / "text.txt"
    file.write_text("a text " * 100)

    class WithTemplate:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
            return letters(text)

        def apply_chat_template(self, messages: list, tokenize: bool) -> str:
            assert tokenize is False
            return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    text = Calibration(data=file, tokenizer=letters, n_tokens=700, sequence_length=70).batches(model)
    assert torch.cat(text).flatten().tolist() == letters("a text " * 100)["input_ids"]
    split = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a text " * 100]})})
    assert torch.equal(
        torch.cat(Calibration(data=split, tokenizer=letters, n_tokens=700, sequence_length=70).batches(model)),
        torch.cat(text),
    )
    turns = [{"role": "user", "content": "q" * 90}, {"role": "assistant", "content": "a" * 90}]
    others = [{"from": "human", "value": "q" * 90}, {"from": "gpt", "value": "a" * 90}]
    rows = {"messages": turns}, {"conversations": others}
    expected = letters(f"<user>{'q' * 90}<assistant>{'a' * 90}")["input_ids"]
    for data in (
        [rows[0]],
        [rows[1]],
        [turns],
        turns,
        rows[0],
        datasets.Dataset.from_list([rows[0]]),
        datasets.Dataset.from_list([rows[1]]),
        datasets.Dataset.from_list([rows[0]]).to_iterable_dataset(),
    ):
        batches = Calibration(
            data=data, tokenizer=WithTemplate(), n_tokens=200, sequence_length=len(expected)
        ).batches(model)
        assert torch.cat(batches).flatten().tolist() == expected


def test_padding_of_rows_is_left_out():
    rows = [{"input_ids": [5] * 100 + [0] * 28, "attention_mask": [1] * 100 + [0] * 28}] * 3
    for data in (rows, datasets.Dataset.from_list(rows)):
        batches = Calibration(data=data, sequence_length=50).batches(dense())
        assert torch.cat(batches).shape == (6, 50)
        assert (torch.cat(batches) == 5).all()


def test_a_loader_is_read_until_it_has_given_enough():
    n_read = 0

    def loader():
        nonlocal n_read
        while True:
            n_read += 1
            yield {"input_ids": ids(), "attention_mask": torch.ones(4, 40, dtype=torch.long)}

    batches = Calibration(data=loader(), n_tokens=640, sequence_length=40).batches(dense())
    assert n_read == 4
    assert torch.equal(torch.cat(batches)[:4], ids())
    images = torch.utils.data.DataLoader([{"pixel_values": torch.ones(3, 8, 8)}] * 100, batch_size=2)
    model = SimpleNamespace(main_input_name="pixel_values", config=None, forward=lambda pixel_values: None)
    assert len(Calibration(data=images, n_tokens=2048, batch_size=8).batches(model)) == 4


def test_a_nested_config_says_vocabulary_and_positions():
    model = llava()
    with pytest.raises(ValueError, match="vocabulary has 128"):
        Calibration(data=IDS + 100).batches(model)
    model.config.text_config.max_position_embeddings = 30
    assert {batch.shape[1] for batch in Calibration(data=IDS, n_tokens=300).batches(model)} == {30}
