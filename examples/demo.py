"""The full pipeline: quantize, finetune, merge back, save, load in a new process; measured at every step.

    python examples/demo.py                         SmolLM2-135M in 4 bits, a few minutes on a laptop
    python examples/demo.py --model NAME --nbits 3
    python examples/demo.py --calibrate             quantize and merge with calibration data: slower, much lower error
    python examples/demo.py --method aqlm --calibrate
    python examples/demo.py --export gguf           ends with a line of text from llama.cpp

The task is made by ``orders_task.py``. The table at the end has the cost and the quality of each step.
"""

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orders_task
import peft
import torch
import transformers
from demo_model import demo_model_folder
from export_demo import export_and_generate
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import peft_quantlayers as pql
from peft_quantlayers.evaluate import perplexity

WIKITEXT = Path(__file__).parent.parent / "benchmarks" / "data" / "wikitext2-test.txt"
WINDOW = 512
BATCH_SIZE = 8
CALIBRATION_TOKENS = 16_384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Stage:
    """One row of the table. ``seconds`` is the step itself, ``seconds_to_evaluate`` the three measurements."""

    name: str
    size_mb: float
    perplexity: float
    task_score: float
    task_loss: float
    seconds: float
    seconds_to_evaluate: float
    seconds_per_step: float | None = None


class Demo:
    """What all steps share: the options, the tokenizer, the data, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = options.model or demo_model_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.train_orders, self.test_orders = orders_task.make_orders(options.steps * BATCH_SIZE, options.orders)
        self.text_ids, self.calibration_ids = text_tokens(self.tokenizer, options.windows * WINDOW)
        self.stages: list[Stage] = []
        self.seconds = 0.0

    def calibration(self, ids: torch.Tensor) -> pql.Calibration:
        return pql.Calibration(data=ids, n_tokens=self.options.calibration_tokens)

    def order_ids(self) -> torch.Tensor:
        """The training orders as one text, on which the merge is calibrated."""
        examples = orders_task.tokenize(self.train_orders, self.tokenizer)
        return torch.tensor([token for example in examples for token in example["input_ids"]])

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"\n== {title}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - start

    def evaluate(self, name: str, model: Any, *, seconds_per_step: float | None = None) -> None:
        """Measure ``model`` and add a row for the step that was just taken."""
        start = time.perf_counter()
        stage = Stage(
            name=name,
            size_mb=size_mb(model),
            perplexity=perplexity(model, self.text_ids, window=WINDOW, progress=True),
            task_score=orders_task.exact_match(model, self.tokenizer, self.test_orders),
            task_loss=orders_task.answer_loss(model, self.tokenizer, self.test_orders),
            seconds=self.seconds,
            seconds_to_evaluate=time.perf_counter() - start,
            seconds_per_step=seconds_per_step,
        )
        self.stages.append(stage)
        print(
            f"{name}: {stage.size_mb:.0f} MB, perplexity {stage.perplexity:.2f}, "
            f"{stage.task_score:.0%} of the orders right"
        )


def main() -> None:
    options = parse_options()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    start = time.perf_counter()
    demo = Demo(options)
    tokenizer, output = demo.tokenizer, Path(options.output)

    with demo.step("Load the float model"):
        model = AutoModelForCausalLM.from_pretrained(demo.source, device_map=DEVICE)
    demo.evaluate("float", model)
    del model

    label = f"{options.nbits} bits" if options.method == "hqq" else "AQLM 2x8"
    config = pql.HQQConfig(nbits=options.nbits) if options.method == "hqq" else pql.AQLMConfig()
    with demo.step(f"Quantize to {label}"):
        if options.calibrate:
            model = AutoModelForCausalLM.from_pretrained(demo.source, device_map=DEVICE)
            pql.quantize_model(model, config, calibration=demo.calibration(demo.calibration_ids))
        else:
            model = AutoModelForCausalLM.from_pretrained(demo.source, quantization_config=config, device_map=DEVICE)
    demo.evaluate(f"quantized, {label}", model)

    with demo.step(f"Finetune with LoRA, {options.steps} steps of {BATCH_SIZE} orders"):
        peft_model, seconds_per_step = finetune(model, demo)
        peft_model.save_pretrained(output / "adapter")
    demo.evaluate("finetuned, adapter beside it", peft_model, seconds_per_step=seconds_per_step)

    with demo.step("Merge back into a dense model"):
        dense, dense_report = pql.merge_back(copy.deepcopy(peft_model), strategy="dense")
    demo.evaluate("merged, dense", dense)

    merges = {"dense": dense_report}
    strategies = {"requantize": "merged, same bits, no data"}
    if options.calibrate:
        strategies["calibrated"] = "merged, same bits, calibrated"
    for strategy, name in strategies.items():
        with demo.step(f"Merge back into {label}: {strategy}"):
            data = demo.calibration(demo.order_ids()) if strategy == "calibrated" else None
            merged, merges[strategy] = pql.merge_back(copy.deepcopy(peft_model), strategy=strategy, calibration=data)
        demo.evaluate(name, merged)
    merges[strategy].save(output / "merge-report.json")

    with demo.step(f"Save as {output / 'merged'}, load it in a new process"):
        pql.save_model(merged, output / "merged", tokenizer=tokenizer, overwrite=True)
        saved = {"merged": check_in_new_process(merged, demo, output / "merged")}

    exported = None
    if options.export:
        with demo.step(f"Export as {options.export} to {output / options.export}"):
            folder, prompt = output / options.export, demo.test_orders[0].prompt
            exported = export_and_generate(output / "merged", folder, options.export, prompt)

    result = {
        "model": str(demo.source.name if isinstance(demo.source, Path) else demo.source),
        "quantized": label,
        "calibrated": options.calibrate,
        "steps": options.steps,
        "stages": [asdict(stage) for stage in demo.stages],
        "merges": [totals(report) for report in merges.values()],
        "saved": saved,
        "exported": exported,
        "note": note(demo.stages),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time(),
        "peak_memory_gib": peak_memory_gib(),
        "machine": machine(),
    }
    print_result(result)
    path = Path(options.json or output / "demo.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"The same as JSON: {path}")
    if not all(check["logits_identical"] for check in saved.values()):
        sys.exit("A saved model gives other logits in a new process than before it was saved. Please report this.")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name on the model hub or local folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--method", choices=("hqq", "aqlm"), default="hqq", help="aqlm: two codebooks of 8 bits")
    parser.add_argument("--nbits", type=int, default=4, help="bits per weight of HQQ")
    parser.add_argument("--calibrate", action="store_true", help="quantize and merge on calibration data")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS, help="with --calibrate")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--orders", type=int, default=48, help="held-out orders to score")
    parser.add_argument("--windows", type=int, default=6, help=f"windows of {WINDOW} tokens for the perplexity")
    parser.add_argument("--export", help="format to export the merged model to, for example gguf")
    parser.add_argument("--output", default="demo-output", help="folder for the adapter, the models and the result")
    parser.add_argument("--json", help="where to write the result (default: demo.json in the output folder)")
    return parser.parse_args()


def text_tokens(tokenizer: Any, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of WikiText-2's test part, to measure on, and the second half of it, to calibrate on."""
    text = WIKITEXT.read_text(encoding="utf-8")
    first, second = text[: min(10 * n_tokens, len(text) // 2)], text[len(text) // 2 :][: 10 * CALIBRATION_TOKENS]
    ids, calibration = (
        torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False).input_ids) for part in (first, second)
    )
    return ids[:n_tokens], calibration


def finetune(model: Any, demo: Demo) -> tuple[Any, float]:
    """The PEFT model, trained on the orders, and the seconds that a step took."""
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    peft_model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    peft_model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=demo.options.output,
        max_steps=demo.options.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, demo.options.steps // 10),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = Trainer(
        peft_model,
        arguments,
        train_dataset=orders_task.tokenize(demo.train_orders, demo.tokenizer),
        data_collator=orders_task.OrderCollator(demo.tokenizer),
    )
    seconds = trainer.train().metrics["train_runtime"]
    return peft_model, seconds / demo.options.steps


def check_in_new_process(model: Any, demo: Demo, folder: Path) -> dict[str, Any]:
    """Load ``folder`` in another process; whether it gives the logits of ``model``, and what it writes there."""
    prompt = demo.test_orders[0].prompt
    ids = demo.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    model.eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.cpu()
    logits_file = folder.parent / "logits.safetensors"
    script = Path(__file__).with_name("load_saved.py")
    command = [sys.executable, str(script), str(folder), prompt, str(logits_file)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    loaded_logits = load_file(logits_file)["logits"]
    logits_file.unlink()
    identical = torch.equal(logits, loaded_logits)
    print(f"logits identical: {identical}; the new process wrote: {done.stdout.strip()!r}")
    return {
        "logits_identical": identical,
        "largest_difference": (logits - loaded_logits).abs().max().item(),
        "prompt": prompt,
        "written": done.stdout.strip(),
        "size_on_disk_mb": sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6,
    }


def size_mb(model: Any) -> float:
    """Megabytes of all tensors of a model; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def totals(report: pql.MergeReport) -> dict[str, Any]:
    return {name: value for name, value in report.to_dict().items() if name != "layers"}


def note(stages: list[Stage]) -> str:
    """A sentence on the merge, from the table."""
    by_name = {stage.name: stage for stage in stages}
    tuned, merged = by_name["finetuned, adapter beside it"], stages[-1]
    said = f"{merged.name}: {merged.task_score:.0%} of the orders right, {tuned.task_score:.0%} before the merge."
    if merged.task_score >= 0.9 * tuned.task_score:
        return said
    calibrate = "" if merged.name.endswith("calibrated") else "merge with --calibrate, or "
    return (
        f"{said} Instead keep the adapter unmerged, or {calibrate}train it merge-aware "
        "(peft_quantlayers.enable_merge_aware)."
    )


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, and of the largest child, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * unit / 2**30


def machine() -> dict[str, Any]:
    """Device and versions, without which no number means anything."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "peft_quantlayers": pql.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}, {result['quantized']}, on {result['machine']['device']}\n")
    print(f"{'stage':30}{'MB':>7}{'perplexity':>12}{'score':>8}{'loss':>8}{'s/step':>8}{'s':>7}{'s to evaluate':>15}")
    for stage in (Stage(**fields) for fields in result["stages"]):
        per_step = "" if stage.seconds_per_step is None else f"{stage.seconds_per_step:.2f}"
        print(
            f"{stage.name:30}{stage.size_mb:7.0f}{stage.perplexity:12.2f}{stage.task_score:8.0%}{stage.task_loss:8.3f}"
            f"{per_step:>8}{stage.seconds:7.1f}{stage.seconds_to_evaluate:15.1f}"
        )
    print(f"\nscore: held-out orders written without a mistake; loss: nats per answer token; {WINDOW}-token windows")
    for merge in result["merges"]:
        print(
            f"merge {merge['strategy']}: {merge['delta_retained']:.2f} of the adapter's delta retained, "
            f"relative error of the weights {merge['relative_error']:.4f}"
        )
    if result["exported"]:
        print(f"exported: {result['exported']['size_mb']:.0f} MB; {result['exported']['serving_command']}")
        print(f"llama.cpp wrote: {result['exported'].get('written', '')!r}")
    for name, check in result["saved"].items():
        same = "identical" if check["logits_identical"] else f"off by {check['largest_difference']:.3g}"
        print(f"saved {name}: {check['size_on_disk_mb']:.0f} MB on disk, logits in a new process {same}")
    print(f"\n{result['note']}")
    print(
        f"\n{result['seconds']:.0f} s in total ({result['cpu_seconds']:.0f} s of CPU time on "
        f"{result['machine']['torch_threads']} threads), peak memory {result['peak_memory_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
