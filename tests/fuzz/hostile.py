"""Damages of the JSON beside the weights: what a typo, another version or an enemy may write."""

import json
import random
from pathlib import Path
from typing import Any

BOMB = "(([a-z._0-9])+)+X"
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 2**200, 0.5, -1e308, float("nan"), float("inf"), "", "4", "hqq",
    "aqlm", "quantlayers", "x" * 10_000, "../../etc/passwd",
    "__import__('os').abort()", "\ud800", "float32", "float16",
    BOMB, [], {}, [None], [[]], {"a": {}}, [0] * 1000, "torch.float32", "cuda:99", "/dev/zero",
)  # fmt: skip
# Fields that a reader cannot tell from what was meant: another number of the same kind is another adapter.
MEANT = {
    "lora_alpha", "r", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "fan_in_fan_out", "modules_to_save",
    "trainable_token_indices", "layer_replication", "task_type", "lora_bias", "use_qalora", "train",
    "arrow_config", "peft_type", "qalora_group_size", "target_parameters", "revision",
    "auto_mapping", "inference_mode",
}  # fmt: skip


def damage_config(file: Path, rng: random.Random) -> tuple[str, str]:
    """Change one place of a JSON file. What was done, and the name of the topmost field that it was done to."""
    fields = json.loads(file.read_text())
    if rng.random() < 0.1:
        return _damage_text(file, rng), ""
    # What our code reads; of adapters that is all.
    inside = fields.get("quantization_config", fields)
    place, path = inside, []
    while True:
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        path.append(str(key))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
        else:
            break
    what = rng.choice(["delete", "replace", "replace", "replace", "rename", "add", "wrap"])
    if what == "delete":
        del place[key]
    elif what == "replace":
        place[key] = value = rng.choice(VALUES)
        what += f" by {str(value)[:60]}"
    elif what == "rename" and isinstance(place, dict):
        place[rng.choice([key + "s", key.upper(), "model." + key, key.replace("0", "7"), ""])] = place.pop(key)
    elif what == "add" and isinstance(place, dict):
        place[rng.choice(["surprise", "__class__", "bnb_4bit_quant_type"])] = rng.choice(VALUES)
    else:
        place[key] = [place[key]]
    # allow_nan, as Python's own reader takes it
    file.write_text(json.dumps(fields))
    return f"{what} at {'.'.join(path)}", path[0]


def _damage_text(file: Path, rng: random.Random) -> str:
    text = file.read_text()
    what = rng.choice(["cut off", "nested", "not an object", "quantization removed", "another method", "bytes"])
    if what == "cut off":
        file.write_text(text[: rng.randrange(len(text))])
    elif what == "nested":
        file.write_text("[" * 100_000)
    elif what == "not an object":
        file.write_text(rng.choice(["null", "[]", "3", '"x"']))
    elif what == "bytes":
        file.write_bytes(rng.randbytes(200))
    else:
        fields = json.loads(text)
        if what == "quantization removed" or "quantization_config" not in fields:
            fields.pop("quantization_config", None)
        else:
            fields["quantization_config"]["quant_method"] = rng.choice(
                ["x", "fp8", "bitsandbytes", "gptq", "hqq", "aqlm"]
            )
        file.write_text(json.dumps(fields))
    return what
