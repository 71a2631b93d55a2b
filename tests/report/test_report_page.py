"""The page of the verb report: what it counts is what a plain computation gives, and it needs nothing outside."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from _tiny_models import tiny_model
from every_method import all_methods, quick_config
from mixtures import tiny_mixture
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import peft_quantlayers as pql
from peft_quantlayers.cli import main
from peft_quantlayers.methods.nf4 import NF4Spec
from peft_quantlayers.report.depth_table import Place, depth_table, place_of
from peft_quantlayers.report.layer_facts import code_use, layer_facts
from peft_quantlayers.report.layer_inputs import layer_inputs
from peft_quantlayers.report.reported_facts import larger_specs, model_facts, worst_layers
from peft_quantlayers.report.training_parts import delta_norms, find_trainer_state, logged_series

matplotlib = pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

CONFIG = pql.HQQConfig(nbits=3, group_size=16)
IDS = torch.randint(3, 100, (200,), generator=torch.Generator().manual_seed(3))


def folders(tmp_path, model, config=CONFIG):
    """A float model and what ``config`` makes of it, saved."""
    model.save_pretrained(tmp_path / "float")
    quantized = pql.quantize_model(model, config, progress=False)
    pql.save_model(quantized, tmp_path / "quantized")
    return quantized


class _Page(HTMLParser):
    """Elements that are open, and all addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.n_plots = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.n_plots += tag == "svg"
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked_page(file):
    """The text of a page that is well formed and refers to nothing outside of itself."""
    text = file.read_text()
    page = _Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png;")) for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    return text, page.n_plots


# ---- places


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", Place("model.layers", 3, "mlp.up_proj")),
        ("encoder.block.1.layer.0.SelfAttention.q", Place("encoder.block", 1, "layer.*.SelfAttention.q")),
        ("model.layers.2.mlp.experts.7.down_proj", Place("model.layers", 2, "mlp.experts.*.down_proj")),
        ("lm_head", Place("", 0, "lm_head")),
    ],
)
def test_the_first_number_of_a_name_is_the_depth(name, place):
    assert place_of(name) == place


def test_a_table_has_the_mean_of_what_shares_a_place_and_two_towers_stay_apart():
    found = depth_table({"a.0.x": 1.0, "a.1.e.0.y": 2.0, "a.1.e.1.y": 4.0, "b.1.x": 5.0})
    assert found.modules == ("a.*.x", "a.*.e.*.y", "b.*.x")
    assert found.depths == (0, 1)
    assert [[None if math.isnan(value) else value for value in row] for row in found.values] == [
        [1.0, None],
        [None, 3.0],
        [None, 5.0],
    ]


# ---- facts of a layer


def test_use_of_codes_is_that_of_the_codes():
    spec = pql.AQLMSpec(num_codebooks=2, nbits_per_codebook=3)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    quantized = pql.registered_methods()["aqlm"].quantize(weight, spec)
    codes = quantized.codes()
    codes[..., 0] = 5
    codes[..., 1] = torch.arange(codes[..., 1].numel()).reshape(codes[..., 1].shape) % 4
    one, four = code_use(quantized.with_codes(codes))
    assert (one.n_entries, one.fraction_used, one.entropy) == (8, 1 / 8, 0.0)
    assert (four.n_entries, four.fraction_used, four.entropy) == (8, 4 / 8, 2.0)


@all_methods
def test_every_method_has_facts_and_larger_forms(method):
    model = pql.quantize_model(tiny_model("LlamaForCausalLM"), quick_config(method), progress=False)
    for name, layer in pql.quantized_modules(model).items():
        facts = layer_facts(name, layer.quantized_weight)
        assert facts.distributions
        assert all(list(each) == sorted(each) for each in facts.distributions.values())
        assert all(
            0 < use.fraction_used <= 1 and 0 <= use.entropy <= math.log2(use.n_entries) for use in facts.code_use
        )
        bits = layer.spec.bits_per_weight(64, 128)[1]
        assert all(larger.bits_per_weight(64, 128)[1] > bits for _, larger in larger_specs(layer.spec, 64, 128))


def test_larger_forms_are_the_next_widths_or_codebooks_or_hqq():
    def labels(spec):
        return [label for label, _ in larger_specs(spec, 64, 128)]

    assert labels(pql.HQQSpec(nbits=3)) == ["nbits=4", "nbits=5"]
    assert labels(pql.HQQSpec(nbits=8)) == []
    assert labels(pql.AQLMSpec(num_codebooks=1)) == ["num_codebooks=2", "num_codebooks=3"]
    assert labels(NF4Spec()) == ["hqq nbits=5", "hqq nbits=6"]
    assert larger_specs(NF4Spec(block_size=40), 64, 120) == []  # its groups of 64 do not divide 120


def test_errors_are_those_of_weights_and_outputs(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    dense = {name: each.weight.detach().clone() for name, each in model.named_modules() if hasattr(each, "weight")}
    quantized = folders(tmp_path, model)
    read = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0][0]}))
        for name, layer in pql.quantized_modules(quantized).items()
    ]
    with torch.no_grad():
        quantized(IDS[None, :128])
    for hook in hooks:
        hook.remove()
    facts = model_facts(
        quantized, float_model=tmp_path / "float", token_ids=IDS, window=128, n_worst=3, progress=False
    )
    assert len(facts) == 14
    for each in facts:
        weight, target, x = quantized.get_submodule(each.name).weight.detach(), dense[each.name], read[each.name]
        assert each.weight_error == pytest.approx(float((weight - target).norm() / target.norm()), rel=1e-4)
        expected = float((x @ (weight - target).T).norm() / (x @ target.T).norm())
        assert each.output_error == pytest.approx(expected, rel=1e-3)
        assert each.distributions["inputs"][-1] == pytest.approx(float(x.abs().max()))
    worst = worst_layers(facts, 3)
    assert [len(each.choices) for each in worst] == [2, 2, 2]
    assert all(each.choices[1].error < each.choices[0].error < each.error for each in worst)
    assert sum(bool(each.choices) for each in facts) == 3


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "BertForSequenceClassification"])
def test_other_architectures_have_errors_and_inputs(name, tmp_path):
    quantized = folders(tmp_path, tiny_model(name))
    facts = model_facts(quantized, float_model=tmp_path / "float", token_ids=IDS, window=32, progress=False)
    assert all(0 < each.weight_error < 1 for each in facts)
    assert sum(each.output_error is not None for each in facts) > len(facts) / 2


def test_stacks_of_experts_have_errors_of_their_weights(tmp_path):
    quantized = folders(tmp_path, tiny_mixture("qwen3_moe"))
    facts = model_facts(quantized, float_model=tmp_path / "float", token_ids=IDS, window=32, progress=False)
    stacks = [each for each in facts if each.name in pql.quantized_stacks(quantized)]
    assert stacks
    assert all(0 < each.weight_error < 1 and each.output_error is None for each in stacks)


def test_the_inputs_of_a_layer_are_taken_evenly_and_leave_no_hook():
    model = pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False)
    found = layer_inputs(model, IDS, window=50)
    assert {len(each.rows) for each in found.values()} == {4 * 32}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_another_float_model_is_refused(tmp_path):
    model = pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False)
    other = tiny_model("LlamaForCausalLM").config
    other.intermediate_size *= 2
    type(tiny_model("LlamaForCausalLM"))(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this is not the float model that it was made of"):
        model_facts(model, float_model=tmp_path, progress=False)


# ---- pages


def test_a_page_on_a_model_names_the_worst_layers(tmp_path, capsys):
    folders(tmp_path, tiny_model("LlamaForCausalLM"))
    assert main(["report", str(tmp_path / "quantized"), "--float_model", str(tmp_path / "float"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    text, n_plots = checked_page(tmp_path / "quantized" / "report.html")
    assert n_plots >= 4  # errors, scales, zeros, use of codes
    assert next(iter(found["model"]["worst"])) in text
    assert "nbits=4" in text


def test_without_the_float_model_the_page_says_how_to_name_it(tmp_path):
    folders(tmp_path, tiny_model("LlamaForCausalLM"), pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=4, rounds=1))
    assert main(["report", str(tmp_path / "quantized"), str(tmp_path / "page.html")]) == 0
    text, n_plots = checked_page(tmp_path / "page.html")
    assert "--float_model" in text
    assert "Use of codebook entries" in text
    assert n_plots >= 2


def test_a_model_without_blocks_and_hostile_names_make_a_page(tmp_path):
    state = {
        "global_step": 2,
        "max_steps": 2,
        "log_history": [{"step": 1, "<script>": 1.0}, {"step": 2, "<script>": 2.0}],
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "train.yaml").write_text("a: <script>alert(1)</script>\n")
    assert main(["report", str(tmp_path)]) == 0
    text, n_plots = checked_page(tmp_path / "report.html")
    assert "<script>" not in text
    assert n_plots == 1


def test_a_page_on_a_run_has_its_curves_and_its_adapter(tmp_path):
    model = get_peft_model(
        pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    log = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3 / step} for step in range(1, 6)]
    log += [{"step": 5, "eval_loss": 0.3}, {"step": 5, "train_runtime": 3.0}]
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(
        json.dumps({"global_step": 5, "max_steps": 9, "log_history": log})
    )
    assert find_trainer_state(tmp_path).parent.name == "checkpoint-5"
    assert logged_series(log)["loss"] == [(float(step), 1 / step) for step in range(1, 6)]
    assert main(["report", str(tmp_path)]) == 0
    text, n_plots = checked_page(tmp_path / "report.html")
    assert "5 of 9 steps" in text
    assert n_plots == 3


def test_the_norm_of_an_adapter_is_that_of_its_product(tmp_path):
    model = get_peft_model(
        pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=4, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    norms = delta_norms(load_file(tmp_path / "adapter_model.safetensors"))
    layers = {name: each for name, each in model.base_model.model.named_modules() if hasattr(each, "get_delta_weight")}
    assert norms.keys() == layers.keys()
    for name, norm in norms.items():
        assert norm == pytest.approx(float(layers[name].get_delta_weight("default").detach().norm()), rel=1e-4)


def test_a_page_on_a_merge_shows_what_is_retained(tmp_path):
    model = get_peft_model(
        pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    merged, report = pql.merge_back(model)
    pql.save_model(merged, tmp_path / "merged")
    report.save(tmp_path / "merged" / "merge_report.json")
    assert main(["report", str(tmp_path / "merged")]) == 0
    text, n_plots = checked_page(tmp_path / "merged" / "report.html")
    assert "Fraction retained" in text
    assert "The layers that lost most" in text
    assert n_plots >= 5


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (None, "", "there is nothing to report on"),
        ("trainer_state.json", "[]", "is no state of a Trainer"),
        ("trainer_state.json", '{"log_history": 3}', "is no state of a Trainer"),
        ("merge_report.json", '{"layers": [{}]}', "is no report of a merge"),
        ("config.json", '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', ""),
    ],
)
def test_what_cannot_be_reported_on_is_one_line_and_no_page(file, content, said, tmp_path, capsys):
    if file is not None:
        (tmp_path / file).write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-quantlayers report: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "unexpected" not in lines[0]
    assert not (tmp_path / "report.html").exists()


def test_a_float_model_is_nothing_to_report_on(tmp_path, capsys):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no quantized layer" in capsys.readouterr().err


def test_the_page_of_an_aqlm_model_has_a_line_for_each_codebook(tmp_path):
    config = pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=4, rounds=0)
    model = folders(tmp_path, tiny_model("LlamaForCausalLM"), config)
    assert main(["report", str(tmp_path / "quantized"), "--float_model", str(tmp_path / "float")]) == 0
    text, _ = checked_page(tmp_path / "quantized" / "report.html")
    uses = [code_use(layer.quantized_weight) for layer in pql.quantized_modules(model).values()]
    for number in range(2):
        entropies = [use[number].entropy for use in uses]
        least = min(use[number].fraction_used for use in uses)
        cells = (number + 1, len(uses), 16, 4, f"{sum(entropies) / len(uses):.4g}", f"{min(entropies):.4g}")
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text
        assert f"<td>{100 * least:.1f} %</td>" in text
    assert "Norm of codebook entries" in text
    # All layers are stored alike, which is a sentence, and no column that fills the page.
    assert "All of these are aqlm num_codebooks=2" in text
    assert text.count("<th>stored as</th>") == 1
