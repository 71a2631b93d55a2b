"""Calibration data of the wrong kind is refused with the way out; files, chats, splits and loaders are read."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from calibration.other_models import ids, llava, t5, whisper
from mistakes import IDS, Calls, Tokenizer, assert_refused, calibrated_with, dense, letters, mistake, short_bert

from peft_quantlayers import Calibration

# The fields of a Calibration; a row of the second names the data, and the model that it is for.
calibration = Calls(Calibration)


def data(name: str, error: type[Exception], *words: str, of: Any, on: Callable[[], Any] = dense, **fields: Any) -> Any:
    return mistake(calibrated_with(of, **fields), error, *words, on=on, name=name)


FIELDS = [
    calibration("field", TypeError, "did you mean 'n_tokens'?", "batch_size", data=IDS, tokens=10),
    calibration("field of another library", TypeError, "sequence_length", data=IDS, seq_len=10),
    calibration("without keyword", TypeError, "Calibration(data=...)", args=(IDS,)),
    calibration("none", TypeError, "data=None", "texts", data=None),
    calibration("text as number", TypeError, "n_tokens must be an integer", data=IDS, n_tokens="many"),
    calibration("float as integer", TypeError, "batch_size must be an integer", data=IDS, batch_size=2.0),
    calibration("flag as number", TypeError, "damping must be a number", data=IDS, damping=True),
    calibration("tokenizer", TypeError, "from_pretrained('gpt2')", data=IDS, tokenizer="gpt2"),
    calibration("resume folder", TypeError, "resume_folder must be the path", data=IDS, resume_folder=3),
]
WITHOUT_TRAIN = datasets.DatasetDict(
    dict.fromkeys(("validation", "test"), datasets.Dataset.from_dict({"text": ["a"]}))
)
QUESTIONS = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
TUPLES = torch.utils.data.DataLoader(list(zip(torch.ones(8, 3, 4), range(8), strict=True)), batch_size=2)
PADDED = {"input_ids": ids(2, 40), "attention_mask": torch.arange(40).expand(2, 40) % 2}
HIDDEN = {"input_ids": ids(), "attention_mask": torch.zeros_like(ids())}
NO_NUMBERS = {"input_ids": ids(), "pixel_values": torch.full((4, 3, 16, 16), torch.nan)}
NO_IMAGE_TOKENS = {"input_ids": ids(), "pixel_values": torch.ones(4, 3, 16, 16)}
FAILS = "LlavaForConditionalGeneration does not run on the calibration data (input_ids, pixel_values)"
TYPO = {"input_ids": ids(), "pixel_value": torch.ones(4, 3, 8, 8)}
CHAT = [{"messages": [{"role": "user", "content": "a" * 200}]}]
DATA = [
    data("path as text", ValueError, "path of a file", "pathlib.Path(", of=__file__),
    data("list of paths as texts", ValueError, "path of a file", of=[__file__]),
    data("missing file", ValueError, "is not a file", of=Path("/no/such/file.txt"), tokenizer=letters),
    data("no train", ValueError, "splits ['validation', 'test']", "data['validation']", of=WITHOUT_TRAIN),
    data("columns", ValueError, "['question', 'answer']", "'messages'", "rename_column", of=QUESTIONS),
    data("chats", ValueError, "chat template", "chat_template", of=CHAT, tokenizer=Tokenizer()),
    data("set", TypeError, "texts, token ids", of={1, 2, 3}),
    data("bytes", TypeError, "texts, token ids", of=b"text" * 100),
    data("array of floats", TypeError, "integers", of=np.ones(300)),
    data("batches and ids", TypeError, "batches must all be mappings", of=[IDS, HIDDEN]),
    data("keyword's typo", ValueError, "did you mean 'pixel_values'?", of=TYPO, on=llava),
    data("NaN", ValueError, "pixel_values", "NaN", of=NO_NUMBERS, on=llava),
    data("images without their tokens", ValueError, FAILS, "Nothing was changed", of=NO_IMAGE_TOKENS, on=llava),
    data("loader of tuples", TypeError, "collate_fn", of=TUPLES),
    data("ids for speech", TypeError, "'input_features'", "processor", of=IDS, on=whisper),
    data(
        "speech without a text",
        ValueError,
        "'decoder_input_ids' or 'labels'",
        of={"input_features": torch.ones(2, 8, 60)},
        on=whisper,
    ),
    data("floats for text", TypeError, "token ids", of=[torch.ones(2, 8)], on=t5),
    data("too long", ValueError, "positions for 16", "truncation=True", of=PADDED, on=short_bert),
]


@pytest.mark.parametrize(("on", "call", "error", "words"), [*FIELDS, *DATA])
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
