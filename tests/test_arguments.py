"""Mistakes in calls of public functions: each is refused in a sentence with the way out, before any change."""

import copy
from pathlib import Path

import pytest
import torch
from calibration.other_models import t5
from mistakes import (
    CONFIG,
    IDS,
    MODEL,
    Calls,
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

# The function and its usual arguments; a row names the others.
quantize = Calls(pql.quantize_model, MODEL, CONFIG, on=dense)
hqq_config = Calls(HQQConfig)
merge = Calls(pql.merge_back, MODEL, on=adapted)
dequantize = Calls(pql.dequantize_model, on=quantized)
summarize = Calls(pql.summary, on=dense)
aware = Calls(pql.enable_merge_aware, on=adapted)
callback = Calls(pql.MergeAwareCallback)
strategy = Calls(pql.set_merge_strategy, on=adapted)
fuse = Calls(pql.fuse_projections, on=adapted)
loftq = Calls(pql.initialize_loftq, on=adapted)
pv_tuner = Calls(pql.PVTuner, MODEL, on=aqlm)
hqq_folder = Calls(pql.load_hqq_folder)
register = Calls(pql.register_method)
from_linear = Calls(pql.HQQLinear.from_linear)
scales = Calls(pql.QuantScalesConfig)
perplexity_of = Calls(perplexity, MODEL, IDS, on=dense)
capture_of = Calls(capture, on=dense)

QUANTIZE = [
    quantize("folder", TypeError, "from_pretrained('folder')", args=("folder", CONFIG)),
    quantize("folder's path", TypeError, "from_pretrained('folder')", args=(Path("folder"), CONFIG)),
    quantize("no model", TypeError, "got None", "from_pretrained", args=(None, CONFIG)),
    quantize("tokenizer", TypeError, "got a Tokenizer", "tokenizer=", args=(Tokenizer(), CONFIG)),
    quantize("swap", TypeError, "quantize_model(model, config)", args=(CONFIG, MODEL)),
    quantize("class of a model", TypeError, "LlamaForCausalLM.from_pretrained", args=(LlamaForCausalLM, CONFIG)),
    quantize("class of a config", TypeError, "HQQConfig()", args=(MODEL, HQQConfig)),
    quantize("method's name", TypeError, "HQQConfig(**fields)", args=(MODEL, "hqq")),
    mistake(
        lambda model: pql.quantize_model((model, "report"), CONFIG), TypeError, "result.model", on=dense, name="a pair"
    ),
    quantize("meta", ValueError, "meta device", "Load the weights first", on=meta_model),
    quantize("device", ValueError, "device='gpu'", device="gpu"),
    quantize("device of a kind", TypeError, "device must be", device=1.5),
    quantize("progress", TypeError, "progress must be True or False", progress="no"),
    quantize("on_layer", TypeError, "on_layer must be a function of a LayerResult", on_layer=3, calibration=IDS),
    quantize("on_layer without data", ValueError, "calibration=", "not changed", on_layer=print),
    quantize(
        "tokenizer's path",
        TypeError,
        "AutoTokenizer.from_pretrained('some/model')",
        calibration=["a text"] * 100,
        tokenizer="some/model",
    ),
    quantize(
        "model as tokenizer", TypeError, "tokenizer must be a tokenizer", calibration=["a text"] * 100, tokenizer=MODEL
    ),
    quantize("number as data", TypeError, "texts, token ids", calibration=7),
    quantize("axis", ValueError, "axis=1", args=(MODEL, HQQConfig(axis=0, group_size=32)), calibration=IDS),
    hqq_config("config without keyword", TypeError, "by keyword", "HQQConfig(", args=(4,)),
    hqq_config("config's typo", TypeError, "did you mean 'nbits'?", "group_size", nbit=4),
    hqq_config("config's text", ValueError, "nbits='4'", "choose one of", nbits="4"),
]

MERGE = [
    merge("folder", TypeError, "from_pretrained('folder')", args=("folder",)),
    merge("none", TypeError, "got None", args=(None,)),
    merge("no adapter", TypeError, "PeftModel", on=quantized),
    merge("strategy's typo", ValueError, "did you mean 'requantize'?", strategy="requantise"),
    merge("no strategy", ValueError, "strategy=None", "'auto'", strategy=None),
    merge("list of strategies", ValueError, "choose one of", strategy=["auto"]),
    merge("bare name", TypeError, "write ['default']", adapters="default"),
    merge("number as a name", TypeError, "list of names", adapters=[0]),
    merge("name's typo", ValueError, "defualt", "'default'", adapters=["defualt"]),
    merge("data for nothing", ValueError, '"calibrated"', calibration=IDS),
    merge("no data", ValueError, "calibration=", strategy="calibrated"),
    merge("path as text", ValueError, "path of a file", strategy="calibrated", calibration=__file__),
    merge("tokenizer", TypeError, "from_pretrained('gpt2')", tokenizer="gpt2"),
    merge("metric", TypeError, "metric must be a function of a model", metric=0.5),
    merge("unload", TypeError, "unload must be True or False", unload="no"),
    merge("progress", TypeError, "progress must be", progress=None),
    merge("text to evaluate on", TypeError, "tokenizer", evaluate_on="a text"),
    merge("foreign ids", ValueError, "vocabulary", evaluate_on=IDS + 100),
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
    dequantize("dequantize: folder", TypeError, "from_pretrained('folder')", args=("folder",)),
    dequantize("dequantize: dtype", TypeError, "dtype=torch.float16", args=(MODEL, "float16")),
    dequantize("dequantize: integers", TypeError, "floating", args=(MODEL, torch.int8)),
    mistake(
        lambda model: pql.dequantize_model(model.to("meta")),
        ValueError,
        "meta device",
        on=lambda: quantized().to("meta"),
        name="dequantize: meta",
    ),
    summarize("summary: folder", TypeError, "from_pretrained('folder')", args=("folder",)),
    summarize("summary: class", TypeError, "HQQConfig()", args=(MODEL, HQQConfig)),
    summarize("summary: dict", TypeError, "(**fields)", args=(MODEL, {"nbits": 4})),
    mistake(lambda _: pql.quantized_modules(None), TypeError, "got None", name="quantized_modules: none"),
    aware("aware: bare name", TypeError, "write ['default']", args=(MODEL, "default")),
    aware("aware: typo", ValueError, "did you mean 'default'?", args=(MODEL, ["defualt"])),
    aware("aware: folder", TypeError, "from_pretrained", args=("folder",)),
    aware("aware: no adapter", ValueError, "get_peft_model", args=(MODEL,), on=quantized),
    callback("callback: text", TypeError, "start_step must be an integer", args=("half",)),
    callback("callback: fraction", TypeError, "start_step must be an integer", args=(0.5,)),
    callback("callback: negative", ValueError, "start_step=-1", args=(-1,)),
    callback("callback: bare name", TypeError, "write ['default']", adapters="default"),
    strategy("strategy: typo", ValueError, "did you mean 'keep'?", args=(MODEL, "kept")),
    strategy("strategy: swapped", TypeError, "takes a model", args=("keep", MODEL)),
    strategy("strategy: needs data", ValueError, "merge_back", args=(MODEL, "calibrated")),
    fuse("fuse: text", TypeError, 'groups=[("q_proj", "k_proj")]', args=(MODEL, "q_proj")),
    fuse("fuse: numbers", TypeError, "several names", args=(MODEL, [(1, 2)])),
    fuse("fuse: none", TypeError, "got None", args=(None,)),
    loftq("loftq: none", TypeError, "float_model must be the model before", args=(MODEL, None)),
    loftq("loftq: fraction", TypeError, "iterations must be an integer", args=(MODEL, dense()), iterations=1.5),
    loftq("loftq: list", TypeError, "adapter='default'", args=(MODEL, dense()), adapter=["default"]),
    loftq("loftq: typo", ValueError, "did you mean 'default'?", args=(MODEL, dense()), adapter="defalt"),
    loftq("loftq: swapped", ValueError, "first argument", args=(dense(), MODEL)),
    pv_tuner("pv: hqq", ValueError, "AQLMConfig", on=quantized),
    pv_tuner("pv: text", TypeError, "lr must be a number", lr="1e-3"),
    pv_tuner("pv: none", TypeError, "code_lr must be a number", code_lr=None),
    pv_tuner("pv: betas", ValueError, "(0.9, 0.95)", betas=0.9),
    pv_tuner("pv: range", ValueError, "trust_ratio=2", trust_ratio=2),
    mistake(lambda model: pql.PVTuner(model.parameters()), TypeError, "takes a model", on=aqlm, name="pv: parameters"),
    hqq_folder("hqq folder: none", TypeError, "path of a folder", args=(None,)),
    hqq_folder("hqq folder: missing", FileNotFoundError, "config.json", args=("/no/such/folder",)),
    hqq_folder("hqq folder: dtype", TypeError, "dtype=torch.float16", args=("folder",), dtype="float16"),
    register("register: class", TypeError, "()", args=(type(pql.registered_methods()["hqq"]),)),
    register("register: text", TypeError, "QuantMethod", args=("hqq",)),
    mistake(lambda _: register_dense_type("torch.nn:Linear"), TypeError, "DenseType(", name="dense type: text"),
    from_linear("from_linear: swapped", TypeError, "an nn.Linear and a spec", args=(HQQSpec(), nn.Linear(64, 64))),
    from_linear("from_linear: bits", TypeError, "HQQSpec(nbits=4)", args=(nn.Linear(64, 64), 4)),
    scales("scales: text", TypeError, "train=('scales',)", train="scales"),
    scales("scales: typo", ValueError, "'scales'", train=["scale"]),
    perplexity_of("perplexity: text", TypeError, "tokenizer(text", args=(MODEL, "a text")),
    perplexity_of("perplexity: swapped", TypeError, "takes a model", args=(IDS, MODEL)),
    perplexity_of("perplexity: floats", TypeError, "integers", args=(MODEL, IDS.float())),
    perplexity_of("perplexity: window", TypeError, "window must be an integer", window="512"),
    perplexity_of("perplexity: none", ValueError, "None for all", max_windows=0),
    perplexity_of("perplexity: t5", TypeError, "causal language models", on=t5),
    perplexity_of("perplexity: bert", TypeError, "causal language models", on=short_bert),
    capture_of("capture: none", TypeError, "base must be a function", args=(MODEL, None, MODEL, IDS)),
    capture_of("capture: list", TypeError, "must be a tensor", args=(MODEL, MODEL, MODEL, IDS.tolist())),
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
