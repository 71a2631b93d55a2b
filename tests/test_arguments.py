"""Mistakes that users make with every public function: each is refused in a sentence with the way out, and nothing
was changed."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from calibration.other_models import ids, llava, t5, whisper
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, HQQSpec
from peft_quantlayers.evaluate import capture, perplexity, saved_for_backward
from peft_quantlayers.layers import register_dense_type

CONFIG = HQQConfig(nbits=4, group_size=32)
IDS = torch.arange(600) % 100


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 128 for letter in text]}


class Tokenizer:
    """As much of a tokenizer as a mistaken argument shows."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return letters(text)

    def decode(self, ids: list[int]) -> str:
        return ""

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        raise AssertionError("there is no template")


def dense() -> nn.Module:
    return tiny_model()


def quantized() -> nn.Module:
    return pql.quantize_model(tiny_model(), CONFIG, progress=False)


def adapted(config: Any = CONFIG, **fields: Any) -> nn.Module:
    base = pql.quantize_model(tiny_model(), config, progress=False)
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | fields
    return get_peft_model(base, LoraConfig(**fields)).eval()


def aqlm() -> nn.Module:
    return pql.quantize_model(tiny_model(), AQLMConfig(nbits_per_codebook=4, rounds=0), progress=False)


def nothing() -> None:
    return None


def bits(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {"grad": [parameter.requires_grad for parameter in model.parameters()], "text": repr(model)}


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def mistake(
    call: Callable[[Any], Any], error: type[Exception], *words: str, on: Callable[[], Any] = nothing, name: str
) -> Any:
    return pytest.param(on, call, error, words, id=name)


def meta_model() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_model().config)


def calibrated_with(data: Any, **fields: Any) -> Callable[[Any], Any]:
    return lambda model: pql.quantize_model(
        model, CONFIG, calibration=Calibration(data=data, **fields), progress=False
    )


QUANTIZE = [
    mistake(lambda _: pql.quantize_model("folder", CONFIG), TypeError, "from_pretrained('folder')", name="folder"),
    mistake(
        lambda _: pql.quantize_model(Path("folder"), CONFIG),
        TypeError,
        "from_pretrained('folder')",
        name="folder's path",
    ),
    mistake(lambda _: pql.quantize_model(None, CONFIG), TypeError, "got None", "from_pretrained", name="no model"),
    mistake(
        lambda _: pql.quantize_model(Tokenizer(), CONFIG), TypeError, "got a Tokenizer", "tokenizer=", name="tokenizer"
    ),
    mistake(
        lambda model: pql.quantize_model(CONFIG, model),
        TypeError,
        "quantize_model(model, config)",
        on=dense,
        name="swap",
    ),
    mistake(
        lambda _: pql.quantize_model(LlamaForCausalLM, CONFIG),
        TypeError,
        "LlamaForCausalLM.from_pretrained",
        name="class of a model",
    ),
    mistake(
        lambda model: pql.quantize_model(model, HQQConfig),
        TypeError,
        "HQQConfig()",
        on=dense,
        name="class of a config",
    ),
    mistake(
        lambda model: pql.quantize_model(model, "hqq"),
        TypeError,
        "HQQConfig(**fields)",
        on=dense,
        name="method's name",
    ),
    mistake(
        lambda model: pql.quantize_model((model, "report"), CONFIG), TypeError, "result.model", on=dense, name="a pair"
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG),
        ValueError,
        "meta device",
        "quantization_config=",
        on=meta_model,
        name="meta",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, device="gpu"),
        ValueError,
        "device='gpu'",
        on=dense,
        name="device",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, device=1.5),
        TypeError,
        "device must be",
        on=dense,
        name="device of a kind",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, progress="no"),
        TypeError,
        "progress must be True or False",
        on=dense,
        name="progress",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, on_layer=3, calibration=IDS),
        TypeError,
        "on_layer must be a function of a LayerResult",
        on=dense,
        name="on_layer",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, on_layer=print),
        ValueError,
        "calibration=",
        "not changed",
        on=dense,
        name="on_layer without data",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, calibration=["a text"] * 100, tokenizer="some/model"),
        TypeError,
        "AutoTokenizer.from_pretrained('some/model')",
        on=dense,
        name="tokenizer's path",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, calibration=["a text"] * 100, tokenizer=model),
        TypeError,
        "tokenizer must be a tokenizer",
        on=dense,
        name="model as tokenizer",
    ),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, calibration=7),
        TypeError,
        "texts, token ids",
        on=dense,
        name="number as data",
    ),
    mistake(
        lambda model: pql.quantize_model(model, HQQConfig(axis=0), calibration=IDS),
        ValueError,
        "axis=1",
        on=dense,
        name="axis",
    ),
    mistake(lambda _: HQQConfig(4), TypeError, "by keyword", "HQQConfig(", name="config without keyword"),
    mistake(lambda _: HQQConfig(nbit=4), TypeError, "did you mean 'nbits'?", "group_size", name="config's typo"),
    mistake(lambda _: HQQConfig(nbits="4"), ValueError, "nbits='4'", "choose one of", name="config's text"),
]

CALIBRATION = [
    mistake(lambda _: Calibration(data=IDS, tokens=10), TypeError, "did you mean 'n_tokens'?", "batch_size", name="field"),
    mistake(lambda _: Calibration(data=IDS, seq_len=10), TypeError, "sequence_length", name="field of another library"),
    mistake(lambda _: Calibration(IDS), TypeError, "Calibration(data=...)", name="without keyword"),
    mistake(lambda _: Calibration(data=None), TypeError, "data=None", "texts", name="none"),
    mistake(lambda _: Calibration(data=IDS, n_tokens="many"), TypeError, "n_tokens must be an integer", name="text as number"),
    mistake(lambda _: Calibration(data=IDS, batch_size=2.0), TypeError, "batch_size must be an integer", name="float as integer"),
    mistake(lambda _: Calibration(data=IDS, damping=True), TypeError, "damping must be a number", name="flag as number"),
    mistake(lambda _: Calibration(data=IDS, tokenizer="gpt2"), TypeError, "from_pretrained('gpt2')", name="tokenizer"),
    mistake(lambda _: Calibration(data=IDS, resume_folder=3), TypeError, "resume_folder must be the path", name="resume folder"),
    mistake(calibrated_with(__file__), ValueError, "path of a file", "pathlib.Path(", on=dense, name="path as text"),
    mistake(calibrated_with([__file__]), ValueError, "path of a file", on=dense, name="list of paths as texts"),
    mistake(calibrated_with(Path("/no/such/file.txt"), tokenizer=letters), ValueError, "is no file", on=dense, name="missing file"),
    mistake(
        lambda model: pql.quantize_model(model, CONFIG, calibration=datasets.DatasetDict(
            {"validation": datasets.Dataset.from_dict({"text": ["a"]}), "test": datasets.Dataset.from_dict({"text": ["a"]})}
        )),
        ValueError, "splits ['validation', 'test']", "data['validation']", on=dense, name="splits without train",
    ),
    mistake(
        calibrated_with(datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})),
        ValueError, "['question', 'answer']", "'messages'", "rename_column", on=dense, name="columns",
    ),
    mistake(
        calibrated_with([{"messages": [{"role": "user", "content": "a" * 200}]}], tokenizer=Tokenizer()),
        ValueError, "chat template", "chat_template", on=dense, name="chats without a template",
    ),
    mistake(calibrated_with({1, 2, 3}), TypeError, "texts, token ids", on=dense, name="set"),
    mistake(calibrated_with(b"text" * 100), TypeError, "texts, token ids", on=dense, name="bytes"),
    mistake(calibrated_with(np.ones(300)), TypeError, "integers", on=dense, name="array of floats"),
    mistake(calibrated_with([IDS, {"input_ids": ids(), "attention_mask": torch.zeros_like(ids())}]), TypeError, "batches must all be mappings", on=dense, name="batches and ids"),
    mistake(calibrated_with({"input_ids": ids(), "pixel_value": torch.ones(4, 3, 8, 8)}), ValueError, "did you mean 'pixel_values'?", on=llava, name="keyword's typo"),
    mistake(calibrated_with({"input_ids": ids(), "pixel_values": torch.full((4, 3, 16, 16), torch.nan)}), ValueError, "pixel_values", "NaN", on=llava, name="NaN"),
    mistake(calibrated_with({"input_ids": ids(), "pixel_values": torch.ones(4, 3, 16, 16)}), ValueError, "LlavaForConditionalGeneration does not run on the calibration data (input_ids, pixel_values)", "Nothing was changed", on=llava, name="images without their tokens"),
    mistake(calibrated_with(torch.utils.data.DataLoader(list(zip(torch.ones(8, 3, 4), range(8), strict=True)), batch_size=2)), TypeError, "collate_fn", on=dense, name="loader of tuples"),
    mistake(calibrated_with(IDS), TypeError, "'input_features'", "processor", on=whisper, name="ids for speech"),
    mistake(calibrated_with({"input_features": torch.ones(2, 8, 60)}), ValueError, "'decoder_input_ids' or 'labels'", on=whisper, name="speech without a text"),
    mistake(calibrated_with([torch.ones(2, 8)]), TypeError, "token ids", on=t5, name="floats for text"),
    mistake(calibrated_with({"input_ids": ids(2, 40), "attention_mask": torch.arange(40).expand(2, 40) % 2}), ValueError, "positions for 16", "truncation=True", on=lambda: short_bert(), name="too long"),
]  # fmt: skip


def short_bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=128, max_position_embeddings=16))


MERGE = [
    mistake(lambda _: pql.merge_back("folder"), TypeError, "from_pretrained('folder')", name="folder"),
    mistake(lambda _: pql.merge_back(None), TypeError, "got None", name="none"),
    mistake(lambda model: pql.merge_back(model), TypeError, "PeftModel", on=quantized, name="no adapter"),
    mistake(lambda model: pql.merge_back(model, strategy="requantise"), ValueError, "did you mean 'requantize'?", on=adapted, name="strategy's typo"),
    mistake(lambda model: pql.merge_back(model, strategy=None), ValueError, "strategy=None", "'auto'", on=adapted, name="no strategy"),
    mistake(lambda model: pql.merge_back(model, strategy=["auto"]), ValueError, "choose one of", on=adapted, name="list of strategies"),
    mistake(lambda model: pql.merge_back(model, adapters="default"), TypeError, "write ['default']", on=adapted, name="bare name"),
    mistake(lambda model: pql.merge_back(model, adapters=[0]), TypeError, "list of names", on=adapted, name="number as a name"),
    mistake(lambda model: pql.merge_back(model, adapters=["defualt"]), ValueError, "defualt", "'default'", on=adapted, name="name's typo"),
    mistake(lambda model: pql.merge_back(model, calibration=IDS), ValueError, '"calibrated"', on=adapted, name="data for nothing"),
    mistake(lambda model: pql.merge_back(model, strategy="calibrated"), ValueError, "calibration=", on=adapted, name="no data"),
    mistake(lambda model: pql.merge_back(model, strategy="calibrated", calibration=__file__), ValueError, "path of a file", on=adapted, name="path as text"),
    mistake(lambda model: pql.merge_back(model, tokenizer="gpt2"), TypeError, "from_pretrained('gpt2')", on=adapted, name="tokenizer"),
    mistake(lambda model: pql.merge_back(model, metric=0.5), TypeError, "metric must be a function of a model", on=adapted, name="metric"),
    mistake(lambda model: pql.merge_back(model, unload="no"), TypeError, "unload must be True or False", on=adapted, name="unload"),
    mistake(lambda model: pql.merge_back(model, progress=None), TypeError, "progress must be", on=adapted, name="progress"),
    mistake(lambda model: pql.merge_back(model, evaluate_on="a text"), TypeError, "tokenizer", on=adapted, name="text to evaluate on"),
    mistake(lambda model: pql.merge_back(model, evaluate_on=IDS + 100), ValueError, "vocabulary", on=adapted, name="foreign ids"),
    mistake(lambda _: pql.merge_back(adapted()).generate(), AttributeError, ".model.generate", "model, report = merge_back(...)", name="pair as a model"),
    mistake(lambda _: pql.merge_back(adapted())(IDS[None]), TypeError, "model, report = merge_back(...)", name="pair is called"),
]  # fmt: skip

OTHERS = [
    mistake(lambda _: pql.dequantize_model("folder"), TypeError, "from_pretrained('folder')", name="dequantize: folder"),
    mistake(lambda model: pql.dequantize_model(model, "float16"), TypeError, "dtype=torch.float16", on=quantized, name="dequantize: dtype"),
    mistake(lambda model: pql.dequantize_model(model, torch.int8), TypeError, "floating", on=quantized, name="dequantize: integers"),
    mistake(lambda model: pql.dequantize_model(model.to("meta")), ValueError, "meta device", name="dequantize: meta", on=lambda: quantized().to("meta")),
    mistake(lambda _: pql.quantized_modules(None), TypeError, "got None", name="quantized_modules: none"),
    mistake(lambda model: pql.enable_merge_aware(model, "default"), TypeError, "write ['default']", on=adapted, name="aware: bare name"),
    mistake(lambda model: pql.enable_merge_aware(model, ["defualt"]), ValueError, "did you mean 'default'?", on=adapted, name="aware: typo"),
    mistake(lambda _: pql.enable_merge_aware("folder"), TypeError, "from_pretrained", name="aware: folder"),
    mistake(lambda model: pql.enable_merge_aware(model), ValueError, "get_peft_model", on=quantized, name="aware: no adapter"),
    mistake(lambda _: pql.MergeAwareCallback("half"), TypeError, "start_step must be an integer", name="callback: text"),
    mistake(lambda _: pql.MergeAwareCallback(0.5), TypeError, "start_step must be an integer", name="callback: fraction"),
    mistake(lambda _: pql.MergeAwareCallback(-1), ValueError, "start_step=-1", name="callback: negative"),
    mistake(lambda _: pql.MergeAwareCallback(adapters="default"), TypeError, "write ['default']", name="callback: bare name"),
    mistake(lambda model: pql.set_merge_strategy(model, "kept"), ValueError, "did you mean 'keep'?", on=adapted, name="strategy: typo"),
    mistake(lambda model: pql.set_merge_strategy("keep", model), TypeError, "takes a model", on=adapted, name="strategy: swapped"),
    mistake(lambda model: pql.set_merge_strategy(model, "calibrated"), ValueError, "merge_back", on=adapted, name="strategy: needs data"),
    mistake(lambda model: pql.fuse_projections(model, "q_proj"), TypeError, 'groups=[("q_proj", "k_proj")]', on=adapted, name="fuse: text"),
    mistake(lambda model: pql.fuse_projections(model, [(1, 2)]), TypeError, "several names", on=adapted, name="fuse: numbers"),
    mistake(lambda _: pql.fuse_projections(None), TypeError, "got None", name="fuse: none"),
    mistake(lambda model: pql.initialize_loftq(model, None), TypeError, "float_model must be the model before", on=adapted, name="loftq: none"),
    mistake(lambda model: pql.initialize_loftq(model, dense(), iterations=1.5), TypeError, "iterations must be an integer", on=adapted, name="loftq: fraction"),
    mistake(lambda model: pql.initialize_loftq(model, dense(), adapter=["default"]), TypeError, "adapter='default'", on=adapted, name="loftq: list"),
    mistake(lambda model: pql.initialize_loftq(model, dense(), adapter="defalt"), ValueError, "did you mean 'default'?", on=adapted, name="loftq: typo"),
    mistake(lambda model: pql.initialize_loftq(dense(), model), ValueError, "first argument", on=adapted, name="loftq: swapped"),
    mistake(lambda model: pql.PVTuner(model), ValueError, "AQLMConfig", on=quantized, name="pv: hqq"),
    mistake(lambda model: pql.PVTuner(model, lr="1e-3"), TypeError, "lr must be a number", on=aqlm, name="pv: text"),
    mistake(lambda model: pql.PVTuner(model, code_lr=None), TypeError, "code_lr must be a number", on=aqlm, name="pv: none"),
    mistake(lambda model: pql.PVTuner(model, betas=0.9), ValueError, "(0.9, 0.95)", on=aqlm, name="pv: betas"),
    mistake(lambda model: pql.PVTuner(model, trust_ratio=2), ValueError, "trust_ratio=2", on=aqlm, name="pv: range"),
    mistake(lambda model: pql.PVTuner(model.parameters()), TypeError, "takes a model", on=aqlm, name="pv: parameters"),
    mistake(lambda _: pql.load_hqq_folder(None), TypeError, "path of a folder", name="hqq folder: none"),
    mistake(lambda _: pql.load_hqq_folder("/no/such/folder"), FileNotFoundError, "config.json", name="hqq folder: missing"),
    mistake(lambda _: pql.load_hqq_folder("folder", dtype="float16"), TypeError, "dtype=torch.float16", name="hqq folder: dtype"),
    mistake(lambda _: pql.register_method(type(pql.registered_methods()["hqq"])), TypeError, "()", name="register: class"),
    mistake(lambda _: pql.register_method("hqq"), TypeError, "QuantMethod", name="register: text"),
    mistake(lambda _: register_dense_type("torch.nn:Linear"), TypeError, "DenseType(", name="dense type: text"),
    mistake(lambda _: pql.HQQLinear.from_linear(HQQSpec(), nn.Linear(64, 64)), TypeError, "an nn.Linear and a spec", name="from_linear: swapped"),
    mistake(lambda _: pql.HQQLinear.from_linear(nn.Linear(64, 64), 4), TypeError, "HQQSpec(nbits=4)", name="from_linear: bits"),
    mistake(lambda _: pql.QuantScalesConfig(train="scales"), TypeError, "train=('scales',)", name="scales: text"),
    mistake(lambda _: pql.QuantScalesConfig(train=["scale"]), ValueError, "'scales'", name="scales: typo"),
    mistake(lambda model: perplexity(model, "a text"), TypeError, "tokenizer(text", on=dense, name="perplexity: text"),
    mistake(lambda model: perplexity(IDS, model), TypeError, "takes a model", on=dense, name="perplexity: swapped"),
    mistake(lambda model: perplexity(model, IDS.float()), TypeError, "integers", on=dense, name="perplexity: floats"),
    mistake(lambda model: perplexity(model, IDS, window="512"), TypeError, "window must be an integer", on=dense, name="perplexity: window"),
    mistake(lambda model: perplexity(model, IDS, max_windows=0), ValueError, "None for all", on=dense, name="perplexity: none"),
    mistake(lambda model: perplexity(model, IDS), TypeError, "causal language models", on=t5, name="perplexity: t5"),
    mistake(lambda model: perplexity(model, IDS), TypeError, "causal language models", on=short_bert, name="perplexity: bert"),
    mistake(lambda model: capture(model, None, model, IDS), TypeError, "base must be a function", on=dense, name="capture: none"),
    mistake(lambda model: capture(model, model, model, IDS.tolist()), TypeError, "must be a tensor", on=dense, name="capture: list"),
    mistake(lambda model: saved_for_backward(IDS, model), TypeError, "takes a model", on=dense, name="memory: swapped"),
]  # fmt: skip


@pytest.mark.parametrize(("on", "call", "error", "words"), [*QUANTIZE, *CALIBRATION, *MERGE, *OTHERS])
def test_a_mistake_is_refused_with_the_way_out_and_changes_nothing(on, call, error, words):
    model = on()
    before = bits(model) if model is None or not any(p.is_meta for p in model.parameters()) else None
    with pytest.raises(error) as refused:
        call(model)
    said = str(refused.value)
    assert type(refused.value) is error
    for word in words:
        assert word in said
    assert re.search(r"[.)?]$", said.strip()), "a sentence"
    if before is not None:
        assert_unchanged(model, before)


def test_there_are_sixty_mistakes_and_more():
    assert len([*QUANTIZE, *CALIBRATION, *MERGE, *OTHERS]) > 100


def test_what_merge_back_returns_unpacks_and_indexes():
    result = pql.merge_back(adapted(), progress=False)
    model, report = result
    assert result[0] is result.model is model
    assert result[1] is result.report is report
    assert isinstance(result, tuple)
    assert len(result) == 2
    assert isinstance(report, pql.MergeReport)
    assert not hasattr(result, "generate")
    assert len(repr(result)) < 200
    assert copy.copy(result) == result


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
