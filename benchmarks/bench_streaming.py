"""Peak memory and time of ``quantize_checkpoint``, on synthetic Llama checkpoints and on SmolLM2.

    python benchmarks/bench_streaming.py                      # 8 and 32 layers (1.5 and 4.2 GB), and SmolLM2
    python benchmarks/bench_streaming.py --layers 8 --hidden 512 [--calibrated] [--method aqlm]

Rows are written as they are made, in the place of those of the same case. Memory is what the process allocates
(RssAnon in /proc/self/status, imports included), sampled in a short interval in a process of its own, and beside it
all resident memory (VmHWM), in which mapped files count too. Linux only.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _device import describe_device
from _memory import MIB, in_own_process, resident_bytes
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.safetensors_file import StoredTensor, write_safetensors
from peft_quantlayers.streaming import quantize_files

SHARD_BYTES = 10**9
SMOLLM2 = "smollm2"
CONFIG = pql.HQQConfig(nbits=4, group_size=64)
CONFIGS = {"hqq": CONFIG, "aqlm": pql.AQLMConfig()}
RESULTS = Path(__file__).parent / "results" / "streaming.json"


def write_checkpoint(folder: Path, *, hidden: int, layers: int, vocabulary: int = 32000) -> None:
    """Random bfloat16 weights of Llama shapes, sharded, with no more than a tensor in memory."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    stored = {name: StoredTensor("BF16", tuple(shape)) for name, shape in shapes.items()}
    shards: list[dict[str, StoredTensor]] = [{}]
    for name, entry in stored.items():
        if sum(each.n_bytes for each in shards[-1].values()) + entry.n_bytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = entry
    generator = torch.Generator().manual_seed(0)

    def random(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16) / hidden**0.5

    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, random, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(source: str, destination: str, method: str, calibrated: str, part_bytes: str) -> dict[str, float]:
    """In a process of its own: quantize, while a thread looks at the memory."""
    torch.set_num_threads(1)
    quantize_files.PART_BYTES = int(part_bytes)
    peak, is_done = [resident_bytes("RssAnon")], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not is_done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    options = {}
    if calibrated == "yes":
        ids = torch.randint(0, 500, (8, 256), generator=torch.Generator().manual_seed(0))
        options["calibration"] = pql.Calibration(data=ids, n_tokens=2048, sequence_length=256)
    pql.quantize_checkpoint(source, destination, CONFIGS[method], progress=False, **options)
    seconds = time.perf_counter() - start
    is_done.set()
    thread.join()
    return {
        "seconds": seconds,
        "imports_mib": before / MIB,
        "peak_anonymous_mib": peak[0] / MIB,
        "peak_resident_mib": resident_bytes("VmHWM") / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--method", choices=CONFIGS, default="hqq")
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--no-smollm2", action="store_true")
    parser.add_argument(
        "--folder", help="where the checkpoints are made; the system's own temporary folder by default"
    )
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    for case in [*given.layers, *([] if given.no_smollm2 else [SMOLLM2])]:
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            source = Path(scratch, "float")
            if case == SMOLLM2:
                from _demo_model import demo_model_folder

                source = demo_model_folder()
            else:
                write_checkpoint(source, hidden=given.hidden, layers=case)
            n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            calibrated = "yes" if given.calibrated else "no"
            arguments = [given.method, calibrated, str(quantize_files.PART_BYTES)]
            told = json.loads(in_own_process("--measure", str(source), str(Path(scratch, "quantized")), *arguments))
            row = {"case": case, "hidden": None if case == SMOLLM2 else given.hidden, "method": given.method}
            keep(row | {"calibrated": given.calibrated, "file_gb": n_bytes / 1e9} | told)


def keep(row: dict[str, Any]) -> None:
    """Print a row, and write it in the place of the one of the same case."""
    print(json.dumps(row), flush=True)
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    of_case = ("method", "calibrated", "hidden", "case")
    others = [each for each in known if any(each[name] != row[name] for name in of_case)]
    rows = sorted([*others, row], key=lambda each: [str(each[name]).rjust(8) for name in of_case])
    RESULTS.write_text(json.dumps({"device": describe_device(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
