"""A local folder under the name of a model on the Hub, in a cache as huggingface_hub lays it out."""

from pathlib import Path

from tiny_folder import byte_tokenizer, save_tiny_llama
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

# The models of the documentation's examples.
MODEL_NAME, MIXTURE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-30B-A3B"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
_COMMIT = "0" * 40


def put_in_hub(cache: Path, folder: Path, name: str = MODEL_NAME) -> Path:
    """Links to the files of ``folder`` in ``cache``, which ``HF_HUB_CACHE`` names."""
    stored = cache / f"models--{name.replace('/', '--')}"
    snapshot = stored / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(_COMMIT)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file.resolve())
    return cache


def tiny_hub(folder: Path) -> Path:
    """A cache with tiny random models under both names; tokens are bytes, and chats are lines."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    put_in_hub(folder / "cache", save_tiny_llama(folder / "model", tokenizer))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 96}
    mixture = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=128, head_dim=16, **sizes, **experts))
    mixture.save_pretrained(folder / "mixture")
    return put_in_hub(folder / "cache", folder / "mixture", MIXTURE_NAME)
