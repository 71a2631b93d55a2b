"""Tiny random models of other kinds than causal text models, each with batches for its forward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
}
TEXT = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
BART = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def ids(n_rows: int = 4, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 120, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def t5() -> hf.T5ForConditionalGeneration:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )


def xlm() -> hf.XLMWithLMHeadModel:
    """Whose blocks write into a cache that they are given."""
    return hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=128, emb_dim=64, n_layers=2, n_heads=4, pad_index=0))


def whisper() -> hf.WhisperForConditionalGeneration:
    sizes = {name: value for name, value in BART.items() if name not in ("max_position_embeddings",)}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=30, max_target_positions=64)
    )


def qwen2_vl() -> hf.Qwen2VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    tower = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config=TEXT | {"rope_parameters": rope},
            vision_config=tower,
            image_token_id=125,
            video_token_id=126,
            vision_start_token_id=123,
            vision_end_token_id=124,
        )
    )


def qwen2_vl_batches() -> list[dict[str, Any]]:
    """Two sequences with an image of 4 x 4 patches each, which are merged to 4 tokens."""
    text = ids(2, 30)
    text[:, 2], text[:, 3:7], text[:, 7] = 123, 125, 124
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (text == 125).int()
    return [
        {
            "input_ids": text,
            "attention_mask": torch.ones_like(text),
            "pixel_values": noise(32, 3 * 2 * 4 * 4),
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
        }
    ] * 2


def llava() -> hf.LlavaForConditionalGeneration:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(**VISION),
            image_token_index=125,
            image_seq_length=16,
            vision_feature_layer=-2,
        )
    )


def llava_batches() -> list[dict[str, Any]]:
    text = ids(2, 30)
    text[:, 2:18] = 125
    return [{"input_ids": text, "pixel_values": noise(2, 3, 16, 16)}] * 2


def wav2vec2() -> hf.Wav2Vec2ForCTC:
    config = hf.Wav2Vec2Config(
        **SIZES,
        conv_dim=(32, 32),
        conv_kernel=(8, 4),
        conv_stride=(4, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
    )
    return hf.Wav2Vec2ForCTC(config)


@dataclass(frozen=True, kw_only=True)
class OtherModel:
    """Fields: make; batches for the forward; the data that a user would give first; parts that these do not reach."""

    make: Callable[[], hf.PreTrainedModel]
    batches: Callable[[], list[dict[str, Any]]]
    plain_data: Callable[[], Any]
    unreached: str = ""


MODELS = {
    "t5": OtherModel(
        make=t5,
        batches=lambda: [{"input_ids": ids(), "labels": ids(4, 20, seed=1)}] * 2,
        plain_data=lambda: ids(8, 40),
    ),
    "bart": OtherModel(
        make=lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        batches=lambda: [{"input_ids": ids(), "decoder_input_ids": ids(4, 20, seed=1)}] * 2,
        plain_data=lambda: ids(8, 40),
    ),
    "whisper": OtherModel(
        make=whisper,
        batches=lambda: [{"input_features": noise(2, 8, 60), "labels": ids(2, 20)}] * 2,
        plain_data=lambda: [{"input_features": noise(2, 8, 60), "decoder_input_ids": ids(2, 20)}] * 2,
    ),
    "qwen2-vl": OtherModel(
        make=qwen2_vl, batches=qwen2_vl_batches, plain_data=lambda: ids(8, 40), unreached="model.visual"
    ),
    "llava": OtherModel(
        make=llava, batches=llava_batches, plain_data=lambda: ids(8, 40), unreached="model.vision_tower"
    ),
    "bert": OtherModel(
        make=lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
        batches=lambda: [{"input_ids": ids(), "token_type_ids": torch.zeros(4, 40, dtype=torch.long)}] * 2,
        plain_data=lambda: ids(8, 40),
    ),
    "vit": OtherModel(
        make=lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        batches=lambda: [{"pixel_values": noise(4, 3, 16, 16)}] * 2,
        plain_data=lambda: [noise(4, 3, 16, 16)] * 2,
    ),
    "wav2vec2": OtherModel(
        make=wav2vec2,
        batches=lambda: [{"input_values": noise(2, 800)}] * 2,
        plain_data=lambda: [noise(2, 800)] * 2,
    ),
    "xlm": OtherModel(make=xlm, batches=lambda: [{"input_ids": ids()}] * 2, plain_data=lambda: ids(8, 40)),
    "mamba": OtherModel(
        make=lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=16)
        ),
        batches=lambda: [{"input_ids": ids()}] * 2,
        plain_data=lambda: ids(8, 40),
    ),
}


def other_model(name: str) -> hf.PreTrainedModel:
    """The model of random weights, the same at every call."""
    torch.manual_seed(0)
    return MODELS[name].make().eval()


def inputs_by_layer(model: nn.Module, names: list[str], batches: list[dict]) -> dict[str, list[Tensor]]:
    """What each layer reads in plain forward passes of the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].float().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen
