"""Small tokenizers of the kinds that llama.cpp's converter tells apart."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def llama_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE as Llama 2 has it: bytes, and the words w0, w1, ..."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "w"]
    tokens += [f"▁w{index}" for index in range(vocabulary - len(tokens))]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], byte_fallback=True)
    model.unk_token = "<unk>"
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save_sentencepiece(folder: Path, text: str, vocabulary: int = 320) -> None:
    """A tokenizer.model that sentencepiece trains on ``text``, and what transformers needs beside it."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=vocabulary,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "text.txt").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "chat_template": "x"}')
