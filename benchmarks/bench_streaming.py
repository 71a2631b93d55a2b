"""Peak memory and time of ``quantize_checkpoint``, on synthetic Llama checkpoints and on SmolLM2.

    python benchmarks/bench_streaming.py                      # 8 and 32 layers (1.5 and 4.2 GB), and SmolLM2
    python benchmarks/bench_streaming.py --layers 8 --hidden 512 [--calibrated] [--method aqlm]
    python benchmarks/bench_streaming.py --shared [--method aqlm --blocks 2]  # calibration on 1 and 2 processes

Rows are written as they are made, in the place of those of the same case. Memory is what the process allocates
(RssAnon in /proc/self/status, imports included), sampled in a short interval in a process of its own, and beside it
all resident memory (VmHWM), in which mapped files count too. Linux only.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _device import describe_device
from _memory import MIB, in_own_process, resident_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.safetensors_file import StoredTensor, write_safetensors
from peft_quantlayers.streaming import quantize_files

SHARD_BYTES = 10**9
SMOLLM2 = "smollm2"
CONFIG = pql.HQQConfig(nbits=4, group_size=64)
CONFIGS = {"hqq": CONFIG, "aqlm": pql.AQLMConfig()}
RESULTS = Path(__file__).parent / "results" / "streaming.json"
SHARED_RESULTS = RESULTS.with_name("shared_calibration.json")
TEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"


def write_checkpoint(
    folder: Path, *, hidden: int, layers: int, intermediate: int | None = None, vocabulary: int = 32000
) -> None:
    """Random bfloat16 weights of Llama shapes, sharded, with no more than a tensor in memory."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate or 4 * hidden,
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


def measure_shared(source: str, destination: str, method: str, n_processes: str, n_tokens: str) -> dict[str, float]:
    """In a process of its own: calibrate with as many processes, of which each has one thread.

    Of the others the processor seconds are those of the one that took most, if there is one, its imports included.
    """
    torch.set_num_threads(1)
    before, start = time.process_time(), time.perf_counter()
    pql.quantize_checkpoint(
        source,
        destination,
        CONFIGS[method],
        calibration=pql.Calibration(data=TEXT, n_tokens=int(n_tokens)),
        n_processes=int(n_processes),
        progress=False,
    )
    seconds, own = time.perf_counter() - start, time.process_time() - before
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "processor_seconds": own,
        "processor_seconds_of_others": others.ru_utime + others.ru_stime,
        "peak_resident_mib": resident_bytes("VmHWM") / MIB,
        "peak_resident_mib_of_others": others.ru_maxrss / 1024,
    }


def shared(given: argparse.Namespace) -> None:
    """Calibration of SmolLM2, or of its first blocks, on one process and on two. Refuses other bytes."""
    from _demo_model import demo_model_folder

    rows, files = [], []
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        source = Path(scratch, "float")
        first_blocks(demo_model_folder(), source, given.blocks)
        for n_processes in (1, 2):
            destination = Path(scratch, str(n_processes))
            arguments = [given.method, str(n_processes), str(given.tokens)]
            told = json.loads(in_own_process("--measure_shared", str(source), str(destination), *arguments))
            case = {"method": given.method, "blocks": given.blocks, "tokens": given.tokens}
            rows.append(case | {"n_processes": n_processes} | told)
            files.append((destination / "model.safetensors").read_bytes())
            print(json.dumps(rows[-1]), flush=True)
    if files[0] != files[1]:
        raise SystemExit("two processes wrote other bytes than one.")
    known = json.loads(SHARED_RESULTS.read_text())["rows"] if SHARED_RESULTS.exists() else []
    kept = [row for row in known if (row["method"], row["blocks"]) != (given.method, given.blocks)]
    found = sorted([*kept, *rows], key=lambda row: (row["method"], row["blocks"], row["n_processes"]))
    SHARED_RESULTS.write_text(json.dumps({"device": describe_device(), "rows": found}, indent=1) + "\n")


def first_blocks(source: Path, folder: Path, n_blocks: int) -> None:
    """The model without its later blocks, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:n_blocks]
    model.config.num_hidden_layers = n_blocks
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


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
    parser.add_argument("--shared", action="store_true", help="calibration on one process and on two")
    parser.add_argument("--blocks", type=int, default=30, help="of SmolLM2, with --shared")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration, with --shared")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--measure_shared", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure_shared:
        print(json.dumps(measure_shared(*given.measure_shared)))
        return
    if given.shared:
        shared(given)
        return
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
