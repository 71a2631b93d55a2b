"""PEFT's methods on our layers: each works or is refused with a message, as the committed table says."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peft_features  # noqa: E402

RECORDED = {row["method"]: row for row in json.loads(peft_features.RESULT.read_text())["rows"]}
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
    assert RECORDED.keys() == peft_features.METHODS.keys()


@pytest.mark.parametrize("base", OURS)
@pytest.mark.parametrize("method", peft_features.METHODS)
def test_a_method_works_or_is_refused_with_a_message(method, base):
    x = torch.randn(16, peft_features.SIZE, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = peft_features.measured(peft_features.BASES[base], peft_features.METHODS[method], x)
    assert cell["state"] in ("works", "refused", "merge refused"), cell["detail"]
    assert cell["detail"]
    assert cell["state"] == RECORDED[method][base]["state"], cell["detail"]


def test_a_feature_that_a_layer_ignores_is_told_from_one_that_works(monkeypatch):
    """PEFT's own HQQ layer trains plain LoRA where KaSA was asked for."""
    x = torch.randn(16, peft_features.SIZE, generator=torch.Generator().manual_seed(3))
    cell = peft_features.measured(peft_features.pefts_hqq, peft_features.METHODS["LoRA, KaSA"], x)
    assert cell == {"state": "wrong", "detail": "ignored in silence: the output is that of plain LoRA"}
