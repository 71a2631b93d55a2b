"""Tiny random models of any architecture of transformers: its default config, made small by the names of the fields.

No table of architectures: a field called ``hidden_size`` is 64 wherever it stands, and a list with an entry for each
layer keeps one layer of each kind. ``SPECIAL`` has the fields of the few configs for which that is not enough. Shared
by ``models_table.py`` and ``tests/models``.
"""

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# Heads that generate text, speech or codes: what a user fine-tunes as a language model.
GENERATIVE = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
)

HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 64, 4, 16, 256
# The first pattern that matches the whole name of an integer field decides.
SIZES: list[tuple[str, int]] = [
    (r"pad_token_id|\w*_pad_token_id", 0),
    (
        r"(num_)?key_value_heads|num_kv_heads|n_kv_heads|\w*num_key_value_heads|\w*_kv_heads|num_global_key_value_heads",
        2,
    ),
    (r"linear_num_key_heads", 2),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"d_head", HEAD_DIM),
    (r"zero_expert_num", 2),
    (r"\w*head_dim|d_kv|attention_head_dim|kv_channels|dim_head|\w*head_size|mamba_d_head", HEAD_DIM),
    (r"\w*(num_|n_)?(attention_)?heads?|n_head|\w*_n_heads|\w*num_heads|linear_num_value_heads", HEADS),
    (r"rotary_dim", HEAD_DIM),
    (r"vocab_size_per_layer_input|\w*vocab_size", VOCABULARY),
    (r"num_experts_per_tok\w*|moe_topk|moe_k|top_k|num_selected_experts|experts_per_token|moe_top_k|router_top_k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|topk_group|n_group|num_expert_group", 1),
    (r"n_routed_experts|\w*num_experts|num_local_experts|moe_num_experts|num_experts\w*", 4),
    (r"\w*(intermediate|ffn|mlp|ff)_(size|dim|hidden_size)|d_ff|ffn_dim|n_inner|mlp_dim|\w*ffn_dim\w*", 2 * HIDDEN),
    (r"hidden_size_per_layer_input|\w*lora_rank|laurel_rank", 16),
    (
        r"\w*hidden_size\w*|d_model|n_embd|hidden_dim|embed_dim|emb_dim|\w*projection_dim|output_dim|word_embed_proj_dim",
        HIDDEN,
    ),
    (
        r"embedding_size|\w*_output_dim|dim|attention_hidden_size|condition_dim|mamba_d_ssm|lru_width|projector_dim|n_dim",
        HIDDEN,
    ),
    (r"\w*num_hidden_layers|num_layers|n_layers?|\w*(encoder|decoder)_layers|depth|\w*_depth|layers|num_blocks", 2),
    (r"num_nextn_predict_layers|first_k_dense_replace", 1),
    (r"image_size|\w*_image_size", 32),
    (r"patch_size", 8),
    (
        r"max_(position_embeddings|source_positions|target_positions|seq_len|length|sequence_length)|n_positions|model_max_length",
        128,
    ),
    (r"sliding_window\w*|window_size|attention_window", 16),
    (r"num_mel_bins|n_mels", 16),
    (r"upsample_initial_channel", 64),
    (r"num_filters|base_channels|latent_channels", 8),
]
PATTERNS = [(re.compile(pattern), value) for pattern, value in SIZES]
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "depth")
INDEXES = re.compile(r"\w*(index|indexes|idx|idxs|indices)")
TOKEN = re.compile(r"\w*token_(id|index)|\w*_idx")

# Fields that many configs leave to the code of the model, which does not always fill them in.
FILLED = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}

# For models that fall back to sections of time, height and width for larger heads.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
MROPE_TYPES = (
    "glm4v_moe_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text",
    "qwen2_vl_text",
)  # fmt: skip

# Fields of configs by model type, where the names alone do not make a model that can be built.
SPECIAL: dict[str, dict[str, Any]] = {
    **{model_type: {"rope_parameters": MROPE} for model_type in MROPE_TYPES},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "chameleon_vqgan": {"base_channels": 32},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cpmant": {"dim_ff": 128},
    "emu3_vqgan": {"base_channels": 32},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122}},
    "falcon_h1": {"mamba_n_heads": 4},
    "florence_vision": {
        "embed_dim": [32, 64],
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "janus_vqgan": {"base_channels": 32},
    "mamba2": {"num_heads": 8},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"hidden_sizes": (16, 32, 64, 64)},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mimi": {"upsample_groups": 64},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 16,
    },
    "rt_detr": {"encoder_in_channels": [16, 32, 32]},
    "rt_detr_resnet": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "zamba": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"], "num_hidden_layers": 6},
}


def generative_classes() -> dict[str, str]:
    """Name of every generative model class, and of the model type of its config, in the order of their names."""
    found: dict[str, str] = {}
    for mapping in GENERATIVE:
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def tiny_config(config_type: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of ``config_type`` with small sizes, those of its parts included."""
    return _shrunk(config_type())


def tiny_model(class_name: str, *, seed: int = 0) -> PreTrainedModel:
    """A model with random weights of a class of transformers, the same for the same ``seed``."""
    model_type = getattr(transformers, class_name)
    config = tiny_config(model_type.config_class)
    torch.manual_seed(seed)
    return model_type(config).eval()


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changed: dict[str, Any] = {}
    kept = _kept_layers(fields)
    for n_token, (name, value) in enumerate(fields.items()):
        if isinstance(value, PreTrainedConfig):
            changed[name] = _shrunk(value)
        elif value is None and name in FILLED:
            changed[name] = FILLED[name]
        elif isinstance(value, bool) or value is None:
            continue
        elif name == "rope_parameters" and isinstance(value, dict):
            changed[name] = _shrunk_rope(value)
        elif isinstance(value, int):
            is_multi_head = name == "num_key_value_heads" and value == fields.get("num_attention_heads")
            changed[name] = HEADS if is_multi_head else _shrunk_integer(name, value, n_token, kept)
        elif isinstance(value, (list, tuple)) and len(value) == _n_layers(fields) and kept:
            changed[name] = type(value)(_shrunk_entry(name, value[index]) for index in kept)
        elif isinstance(value, (list, tuple)) and name == "depths":
            changed[name] = type(value)([1] * len(value))
        elif isinstance(value, (list, tuple)) and INDEXES.fullmatch(name):
            changed[name] = type(value)([0])
    changed = {name: value for name, value in changed.items() if value is not fields[name]}
    return type(config)(**{**changed, **SPECIAL.get(config.model_type, {})})


def _shrunk_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters whose sections (time, height, width) add up to half of the tiny heads."""
    found = {name: _shrunk_rope(part) if isinstance(part, dict) else part for name, part in value.items()}
    if sections := found.get("mrope_section"):
        found["mrope_section"] = [HEAD_DIM // 2 - 2 * (len(sections) - 1), *[2] * (len(sections) - 1)]
    return found


def _n_layers(fields: dict[str, Any]) -> int | None:
    return next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), None)


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Indices of two layers or more, one of each kind that the lists with an entry for each layer tell apart."""
    n_layers = _n_layers(fields)
    lists = [value for value in fields.values() if isinstance(value, (list, tuple)) and len(value) == n_layers]
    if not lists or not n_layers or n_layers < 3:
        return []
    kinds = [str(kind) for kind in zip(*lists, strict=True)]
    kept = sorted({kinds.index(kind) for kind in dict.fromkeys(kinds)})[:4]
    return kept if len(kept) > 1 else [kept[0], kept[0] + 1]


def _shrunk_entry(name: str, value: Any) -> Any:
    """An entry of a list with one for each layer, which may be a size."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and name.endswith("_size")
    return _shrunk_integer(name, value, 0, []) if is_size else value


def _shrunk_integer(name: str, value: int, n_token: int, kept: list[int]) -> int:
    if name in LAYERS and kept:
        return len(kept)
    for pattern, size in PATTERNS:
        if pattern.fullmatch(name):
            return min(value, size) if value > 0 else value
    if TOKEN.fullmatch(name) and value >= VOCABULARY - 100:
        return VOCABULARY - 1 - n_token % 90
    return value


def tiny_inputs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Inputs on which ``model`` runs forward; None if none of those that we know does.

    Text only where the architecture allows it. Token ids are none that the config gives a meaning to.
    """
    for inputs in _candidates(model):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                output = model(**inputs)
        except Exception:  # whatever an architecture raises on inputs that are not its own
            continue
        if first_float(output) is not None:
            return inputs
    return None


def first_float(output: Any) -> torch.Tensor | None:
    """The first floating tensor of what a model returned, for example its logits."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else [output]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
    return None


def _candidates(model: PreTrainedModel) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 12), generator=generator)
    dtype = model.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    decoder = {"decoder_input_ids": ids[:, :6]}
    mels = random(2, 16, 256)
    main: list[dict[str, Any]] = [
        {"input_ids": ids},
        {"input_features": mels},
        {"input_features": mels.transpose(1, 2).contiguous()},
        {"input_features": random(2, 64, 160)},
        {"input_features": random(2, 128, 80)},
        {"input_values": random(2, 2000)},
        {"input_values": random(2, 1, 2000)},
        {"input_values": random(2, 64, 16)},
        {"input_values": random(2, 64, 80)},
        {"pixel_values": random(2, 3, 32, 32)},
        {"pixel_values": random(2, 3, 32, 32), "input_ids": ids},
        {"flattened_patches": random(2, 8, 770)},
        {"input_ids": torch.randint(3, 100, (2, 12, 4), generator=generator)},
        {"input_ids": torch.randint(3, 100, (2, 4, 12), generator=generator)},
        {"inputs_embeds": random(2, 12, HIDDEN)},
    ]
    if "use_cache" in inspect.signature(model.forward).parameters or getattr(model.config, "use_cache", False):
        main = [inputs | {"use_cache": False} for inputs in main] + main
    main.sort(key=lambda inputs: model.main_input_name not in inputs)
    with_decoder = [inputs | decoder for inputs in main]
    return with_decoder + main if getattr(model.config, "is_encoder_decoder", False) else main + with_decoder
