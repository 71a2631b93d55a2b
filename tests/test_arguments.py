"""Mistakes in calls of public functions: each is refused in a sentence with the way out, before any change."""

import copy
from pathlib import Path

import pytest
import torch
from calibration.other_models import t5
from mistakes import (
    CONFIG,
    IDS,
    Tokenizer,
    adapted,
    aqlm,
    assert_refused,
    dense,
    meta_model,
    mistake,
    quantized,
    short_bert,
)
from torch import nn
from transformers import LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQSpec
from peft_quantlayers.evaluate import capture, perplexity, saved_for_backward
from peft_quantlayers.layers import register_dense_type

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
        "Load the weights first",
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
        lambda model: pql.quantize_model(model, HQQConfig(axis=0, group_size=32), calibration=IDS),
        ValueError,
        "axis=1",
        on=dense,
        name="axis",
    ),
    mistake(lambda _: HQQConfig(4), TypeError, "by keyword", "HQQConfig(", name="config without keyword"),
    mistake(lambda _: HQQConfig(nbit=4), TypeError, "did you mean 'nbits'?", "group_size", name="config's typo"),
    mistake(lambda _: HQQConfig(nbits="4"), ValueError, "nbits='4'", "choose one of", name="config's text"),
]

MERGE = [
    mistake(lambda _: pql.merge_back("folder"), TypeError, "from_pretrained('folder')", name="folder"),
    mistake(lambda _: pql.merge_back(None), TypeError, "got None", name="none"),
    mistake(lambda model: pql.merge_back(model), TypeError, "PeftModel", on=quantized, name="no adapter"),
    mistake(
        lambda model: pql.merge_back(model, strategy="requantise"),
        ValueError,
        "did you mean 'requantize'?",
        on=adapted,
        name="strategy's typo",
    ),
    mistake(
        lambda model: pql.merge_back(model, strategy=None),
        ValueError,
        "strategy=None",
        "'auto'",
        on=adapted,
        name="no strategy",
    ),
    mistake(
        lambda model: pql.merge_back(model, strategy=["auto"]),
        ValueError,
        "choose one of",
        on=adapted,
        name="list of strategies",
    ),
    mistake(
        lambda model: pql.merge_back(model, adapters="default"),
        TypeError,
        "write ['default']",
        on=adapted,
        name="bare name",
    ),
    mistake(
        lambda model: pql.merge_back(model, adapters=[0]),
        TypeError,
        "list of names",
        on=adapted,
        name="number as a name",
    ),
    mistake(
        lambda model: pql.merge_back(model, adapters=["defualt"]),
        ValueError,
        "defualt",
        "'default'",
        on=adapted,
        name="name's typo",
    ),
    mistake(
        lambda model: pql.merge_back(model, calibration=IDS),
        ValueError,
        '"calibrated"',
        on=adapted,
        name="data for nothing",
    ),
    mistake(
        lambda model: pql.merge_back(model, strategy="calibrated"),
        ValueError,
        "calibration=",
        on=adapted,
        name="no data",
    ),
    mistake(
        lambda model: pql.merge_back(model, strategy="calibrated", calibration=__file__),
        ValueError,
        "path of a file",
        on=adapted,
        name="path as text",
    ),
    mistake(
        lambda model: pql.merge_back(model, tokenizer="gpt2"),
        TypeError,
        "from_pretrained('gpt2')",
        on=adapted,
        name="tokenizer",
    ),
    mistake(
        lambda model: pql.merge_back(model, metric=0.5),
        TypeError,
        "metric must be a function of a model",
        on=adapted,
        name="metric",
    ),
    mistake(
        lambda model: pql.merge_back(model, unload="no"),
        TypeError,
        "unload must be True or False",
        on=adapted,
        name="unload",
    ),
    mistake(
        lambda model: pql.merge_back(model, progress=None), TypeError, "progress must be", on=adapted, name="progress"
    ),
    mistake(
        lambda model: pql.merge_back(model, evaluate_on="a text"),
        TypeError,
        "tokenizer",
        on=adapted,
        name="text to evaluate on",
    ),
    mistake(
        lambda model: pql.merge_back(model, evaluate_on=IDS + 100),
        ValueError,
        "vocabulary",
        on=adapted,
        name="foreign ids",
    ),
    mistake(
        lambda _: pql.merge_back(adapted()).generate(),
        AttributeError,
        ".model.generate",
        "model, report = merge_back(...)",
        name="pair as a model",
    ),
    mistake(
        lambda _: pql.merge_back(adapted())(IDS[None]),
        TypeError,
        "model, report = merge_back(...)",
        name="pair is called",
    ),
]

OTHERS = [
    mistake(
        lambda _: pql.dequantize_model("folder"), TypeError, "from_pretrained('folder')", name="dequantize: folder"
    ),
    mistake(
        lambda model: pql.dequantize_model(model, "float16"),
        TypeError,
        "dtype=torch.float16",
        on=quantized,
        name="dequantize: dtype",
    ),
    mistake(
        lambda model: pql.dequantize_model(model, torch.int8),
        TypeError,
        "floating",
        on=quantized,
        name="dequantize: integers",
    ),
    mistake(
        lambda model: pql.dequantize_model(model.to("meta")),
        ValueError,
        "meta device",
        name="dequantize: meta",
        on=lambda: quantized().to("meta"),
    ),
    mistake(lambda _: pql.summary("folder"), TypeError, "from_pretrained('folder')", name="summary: folder"),
    mistake(lambda model: pql.summary(model, HQQConfig), TypeError, "HQQConfig()", on=dense, name="summary: class"),
    mistake(lambda model: pql.summary(model, {"nbits": 4}), TypeError, "(**fields)", on=dense, name="summary: dict"),
    mistake(lambda _: pql.quantized_modules(None), TypeError, "got None", name="quantized_modules: none"),
    mistake(
        lambda model: pql.enable_merge_aware(model, "default"),
        TypeError,
        "write ['default']",
        on=adapted,
        name="aware: bare name",
    ),
    mistake(
        lambda model: pql.enable_merge_aware(model, ["defualt"]),
        ValueError,
        "did you mean 'default'?",
        on=adapted,
        name="aware: typo",
    ),
    mistake(lambda _: pql.enable_merge_aware("folder"), TypeError, "from_pretrained", name="aware: folder"),
    mistake(
        lambda model: pql.enable_merge_aware(model),
        ValueError,
        "get_peft_model",
        on=quantized,
        name="aware: no adapter",
    ),
    mistake(
        lambda _: pql.MergeAwareCallback("half"), TypeError, "start_step must be an integer", name="callback: text"
    ),
    mistake(
        lambda _: pql.MergeAwareCallback(0.5), TypeError, "start_step must be an integer", name="callback: fraction"
    ),
    mistake(lambda _: pql.MergeAwareCallback(-1), ValueError, "start_step=-1", name="callback: negative"),
    mistake(
        lambda _: pql.MergeAwareCallback(adapters="default"),
        TypeError,
        "write ['default']",
        name="callback: bare name",
    ),
    mistake(
        lambda model: pql.set_merge_strategy(model, "kept"),
        ValueError,
        "did you mean 'keep'?",
        on=adapted,
        name="strategy: typo",
    ),
    mistake(
        lambda model: pql.set_merge_strategy("keep", model),
        TypeError,
        "takes a model",
        on=adapted,
        name="strategy: swapped",
    ),
    mistake(
        lambda model: pql.set_merge_strategy(model, "calibrated"),
        ValueError,
        "merge_back",
        on=adapted,
        name="strategy: needs data",
    ),
    mistake(
        lambda model: pql.fuse_projections(model, "q_proj"),
        TypeError,
        'groups=[("q_proj", "k_proj")]',
        on=adapted,
        name="fuse: text",
    ),
    mistake(
        lambda model: pql.fuse_projections(model, [(1, 2)]),
        TypeError,
        "several names",
        on=adapted,
        name="fuse: numbers",
    ),
    mistake(lambda _: pql.fuse_projections(None), TypeError, "got None", name="fuse: none"),
    mistake(
        lambda model: pql.initialize_loftq(model, None),
        TypeError,
        "float_model must be the model before",
        on=adapted,
        name="loftq: none",
    ),
    mistake(
        lambda model: pql.initialize_loftq(model, dense(), iterations=1.5),
        TypeError,
        "iterations must be an integer",
        on=adapted,
        name="loftq: fraction",
    ),
    mistake(
        lambda model: pql.initialize_loftq(model, dense(), adapter=["default"]),
        TypeError,
        "adapter='default'",
        on=adapted,
        name="loftq: list",
    ),
    mistake(
        lambda model: pql.initialize_loftq(model, dense(), adapter="defalt"),
        ValueError,
        "did you mean 'default'?",
        on=adapted,
        name="loftq: typo",
    ),
    mistake(
        lambda model: pql.initialize_loftq(dense(), model),
        ValueError,
        "first argument",
        on=adapted,
        name="loftq: swapped",
    ),
    mistake(lambda model: pql.PVTuner(model), ValueError, "AQLMConfig", on=quantized, name="pv: hqq"),
    mistake(lambda model: pql.PVTuner(model, lr="1e-3"), TypeError, "lr must be a number", on=aqlm, name="pv: text"),
    mistake(
        lambda model: pql.PVTuner(model, code_lr=None), TypeError, "code_lr must be a number", on=aqlm, name="pv: none"
    ),
    mistake(lambda model: pql.PVTuner(model, betas=0.9), ValueError, "(0.9, 0.95)", on=aqlm, name="pv: betas"),
    mistake(lambda model: pql.PVTuner(model, trust_ratio=2), ValueError, "trust_ratio=2", on=aqlm, name="pv: range"),
    mistake(lambda model: pql.PVTuner(model.parameters()), TypeError, "takes a model", on=aqlm, name="pv: parameters"),
    mistake(lambda _: pql.load_hqq_folder(None), TypeError, "path of a folder", name="hqq folder: none"),
    mistake(
        lambda _: pql.load_hqq_folder("/no/such/folder"), FileNotFoundError, "config.json", name="hqq folder: missing"
    ),
    mistake(
        lambda _: pql.load_hqq_folder("folder", dtype="float16"),
        TypeError,
        "dtype=torch.float16",
        name="hqq folder: dtype",
    ),
    mistake(
        lambda _: pql.register_method(type(pql.registered_methods()["hqq"])), TypeError, "()", name="register: class"
    ),
    mistake(lambda _: pql.register_method("hqq"), TypeError, "QuantMethod", name="register: text"),
    mistake(lambda _: register_dense_type("torch.nn:Linear"), TypeError, "DenseType(", name="dense type: text"),
    mistake(
        lambda _: pql.HQQLinear.from_linear(HQQSpec(), nn.Linear(64, 64)),
        TypeError,
        "an nn.Linear and a spec",
        name="from_linear: swapped",
    ),
    mistake(
        lambda _: pql.HQQLinear.from_linear(nn.Linear(64, 64), 4),
        TypeError,
        "HQQSpec(nbits=4)",
        name="from_linear: bits",
    ),
    mistake(lambda _: pql.QuantScalesConfig(train="scales"), TypeError, "train=('scales',)", name="scales: text"),
    mistake(lambda _: pql.QuantScalesConfig(train=["scale"]), ValueError, "'scales'", name="scales: typo"),
    mistake(lambda model: perplexity(model, "a text"), TypeError, "tokenizer(text", on=dense, name="perplexity: text"),
    mistake(lambda model: perplexity(IDS, model), TypeError, "takes a model", on=dense, name="perplexity: swapped"),
    mistake(lambda model: perplexity(model, IDS.float()), TypeError, "integers", on=dense, name="perplexity: floats"),
    mistake(
        lambda model: perplexity(model, IDS, window="512"),
        TypeError,
        "window must be an integer",
        on=dense,
        name="perplexity: window",
    ),
    mistake(
        lambda model: perplexity(model, IDS, max_windows=0),
        ValueError,
        "None for all",
        on=dense,
        name="perplexity: none",
    ),
    mistake(lambda model: perplexity(model, IDS), TypeError, "causal language models", on=t5, name="perplexity: t5"),
    mistake(
        lambda model: perplexity(model, IDS),
        TypeError,
        "causal language models",
        on=short_bert,
        name="perplexity: bert",
    ),
    mistake(
        lambda model: capture(model, None, model, IDS),
        TypeError,
        "base must be a function",
        on=dense,
        name="capture: none",
    ),
    mistake(
        lambda model: capture(model, model, model, IDS.tolist()),
        TypeError,
        "must be a tensor",
        on=dense,
        name="capture: list",
    ),
    mistake(
        lambda model: saved_for_backward(IDS, model), TypeError, "takes a model", on=dense, name="memory: swapped"
    ),
]


@pytest.mark.parametrize(("on", "call", "error", "words"), [*QUANTIZE, *MERGE, *OTHERS])
def test_a_mistake_is_refused_with_the_way_out_and_changes_nothing(on, call, error, words):
    assert_refused(on, call, error, words)


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
