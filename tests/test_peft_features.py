"""PEFT's methods on our layers: each works or is refused with a message, as the committed table says."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peft_features  # noqa: E402

RECORDED = {row["method"]: row for row in json.loads(peft_features.RESULT.read_text())["rows"]}
ROWS = [*peft_features.METHODS, *peft_features.FEATURES]
OURS = [name for name in peft_features.BASES if name.startswith("ours")]


def test_the_table_covers_every_method_of_peft_that_adapts_linear_layers():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [make() for make in peft_features.METHODS.values()]
    measured = {type(config).__name__ for config in made if not isinstance(config, tuple)}
    known = [config for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() if config.__module__.startswith("peft.")]
    others = {config.__name__ for config in known} - measured
    # These learn prompts, tokens or whole blocks; no layer of ours is adapted.
    assert others == {
        "AdaptionPromptConfig", "CPTConfig", "CartridgeConfig", "MultitaskPromptTuningConfig", "PolyConfig",
        "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "ShadowConfig", "TrainableTokensConfig",
    }  # fmt: skip
    assert list(RECORDED) == ROWS


def test_the_committed_table_is_the_recorded_result():
    document = (ROOT / "docs" / "peft-features.md").read_text()
    lines = document.partition("<!-- table peft_features -->")[2].partition("<!-- end -->")[0].splitlines()
    head = ["method or feature", *peft_features.BASES]
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert table == [head, ["---"] * len(head), *([name, *map(state_of(name), head[1:])] for name in ROWS)]
    reasons = [line for line in lines if re.match(r"- .*, (ours|PEFT's own), (HQQ|AQLM): ", line)]
    assert reasons == [
        f"- {name}, {base}: {RECORDED[name][base]['detail']}"
        for name in ROWS
        for base in peft_features.BASES
        if RECORDED[name][base]["state"] != "works"
    ]


def state_of(name: str):
    return lambda base: RECORDED[name][base]["state"]


def test_no_reason_is_cut_off_in_a_word_or_names_a_folder_of_this_machine():
    details = [cell["detail"] for row in RECORDED.values() for base, cell in row.items() if base != "method"]
    assert all(len(detail) <= peft_features.MESSAGE_LENGTH + 50 for detail in details)
    assert not [detail for detail in details if detail.endswith(("(", ",", ":")) or re.search(r"(?<!\w)/\w", detail)]


@pytest.mark.parametrize("base", OURS)
@pytest.mark.parametrize("name", ROWS)
def test_a_feature_works_or_is_refused_with_a_message(name, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = peft_features.cell(name, base)
    assert cell["state"] in ("works", "refused", "merge refused"), cell["detail"]
    assert cell["detail"]
    assert cell["state"] == RECORDED[name][base]["state"], cell["detail"]


def test_a_feature_that_a_layer_ignores_is_told_from_one_that_works():
    """PEFT's own HQQ layer trains plain LoRA where KaSA was asked for."""
    cell = peft_features.cell("LoRA, KaSA", "PEFT's own, HQQ")
    assert cell == {"state": "wrong", "detail": "ignored in silence: the output is that of plain LoRA"}
