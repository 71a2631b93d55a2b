"""How much of an adapter a merge retains: SmolLM2-135M, two tasks, every strategy, and PEFT's merge with ``hqq``.

    python benchmarks/bench_merge.py            all settings, three seeds: hours on two cores
    python benchmarks/bench_merge.py --quick    one setting, one seed, a few steps: minutes; in merge_quick.json

For each setting, task and seed four adapters are trained with the same data, steps and learning rate: plain LoRA,
merge-aware LoRA, QA-LoRA with about as many parameters, and the scales alone. Each is merged and compared on held-out
tokens with itself before the merge (capture) and by its loss; the losses show what a constraint costs in training.
"peft+hqq" is PEFT's merge into an ``HQQLinear``: dequantize, add the delta, quantize from scratch with ``hqq``.
Rows are added to the result file as they come.

    python benchmarks/bench_merge.py --only-steps      seconds and memory of a training step only
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from _memory import in_own_process, reset_peak, resident_bytes
from _peers import peer_weight, quantize_with_hqq
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.evaluate import Capture, capture
from peft_quantlayers.lora.rounded_weight import STEPS_PER_CHOICE
from quantlayers_kernels.cache_folder import cache_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import orders_task  # noqa: E402

TEXT = ROOT / "benchmarks" / "data" / "wikitext2-test.txt"
RESULTS = ROOT / "benchmarks" / "results" / "merge.json"
RANK = 8
CALIBRATION_TOKENS = 16_384
SETTINGS: dict[str, pql.QuantConfig] = {
    "HQQ 4-bit g64": pql.HQQConfig(nbits=4, group_size=64),
    "HQQ 3-bit g64": pql.HQQConfig(nbits=3, group_size=64),
    "HQQ 2-bit g16": pql.HQQConfig(nbits=2, group_size=16),
    "AQLM 2x8, calibrated": pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=8),
}
TRAININGS = ("plain", "aware", "qalora", "scales")
# A merge whose scales and codebooks are then trained towards the unmerged model's predictions, and for how long.
TUNED, TUNE_EPOCHS = "calibrated, tuned", 2
# Merges into other bits than the base has, of the same bytes: what a layer may take.
BUDGET, BUDGET_SETTING = 3.5, "HQQ 4-bit g64"
BUDGETED = {"calibrated, 3 bits": [3], "calibrated, 2 to 4 bits": [2, 3, 4]}
CACHE = cache_folder() / "bench_merge"
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One merge. Losses are per held-out token, of orders per token of an answer, nats; scores are fractions of
    held-out orders without a mistake."""

    setting: str
    task: str
    seed: int
    training: str
    strategy: str
    trained_parameters: int
    adapter_mb: float
    capture: float
    loss_base: float
    loss_adapter: float
    loss_merged: float
    score_adapter: float | None
    score_merged: float | None
    seconds_to_merge: float


def training_part(ids: Tensor, options: argparse.Namespace) -> Tensor:
    """All of the text but the held-out tokens at its end and some before them."""
    return ids[: -options.held_out_tokens - 1024]


class TextTask:
    """Adaptation to a domain: the first part of WikiText-2's test text to train on, the last tokens held out."""

    name = "text"

    def __init__(self, tokenizer: Any, options: argparse.Namespace, seed: int) -> None:
        ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        self.held_out = ids[-options.held_out_tokens :]
        self.train = training_part(ids, options)
        self.options, self.seed = options, seed

    def batches(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        n = self.options.tokens
        while True:
            starts = torch.randint(len(self.train) - n, (self.options.batch,), generator=generator)
            ids = torch.stack([self.train[start : start + n] for start in starts])
            yield {"input_ids": ids, "labels": ids}

    def score(self, model: nn.Module) -> float | None:
        return None

    def losses(self, model: nn.Module, merged: nn.Module, kept: Capture) -> tuple[float, float, float]:
        return kept.loss_base, kept.loss_adapter, kept.loss_merged


class OrdersTask:
    """The demo's task; capture is measured on prompts and answers of orders that were not trained on."""

    name = "orders"

    def __init__(self, tokenizer: Any, options: argparse.Namespace, seed: int) -> None:
        n_train = options.steps * options.batch
        train, self.test = orders_task.make_orders(n_train, options.orders, seed=seed)
        examples = orders_task.tokenize(self.test, tokenizer)
        self.held_out = torch.tensor([token for example in examples for token in example["input_ids"]])
        self.examples, self.tokenizer = orders_task.tokenize(train, tokenizer), tokenizer
        self.train = torch.tensor([token for example in self.examples for token in example["input_ids"]])
        self.options = options

    def batches(self) -> Iterator[Batch]:
        collate = orders_task.OrderCollator(self.tokenizer)
        for start in range(0, len(self.examples), self.options.batch):
            yield collate(self.examples[start : start + self.options.batch])

    def score(self, model: nn.Module) -> float | None:
        return orders_task.exact_match(model, self.tokenizer, self.test)

    def losses(self, model: nn.Module, merged: nn.Module, kept: Capture) -> tuple[float, float, float]:
        with model.disable_adapter():
            base = orders_task.answer_loss(model, self.tokenizer, self.test)
        adapter, after = (orders_task.answer_loss(each, self.tokenizer, self.test) for each in (model, merged))
        return base, adapter, after


TASKS: dict[str, Callable[..., Any]] = {"text": TextTask, "orders": OrdersTask}


def adapter_config(training: str, base: nn.Module, config: pql.QuantConfig) -> PeftConfig:
    if training == "scales":
        return pql.QuantScalesConfig(train=("scales",))
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    if training == "qalora":
        layers = list(pql.quantized_modules(base).values())
        size = config.group_size
        plain = RANK * sum(layer.in_features + layer.out_features for layer in layers)
        rank = round(plain / sum(layer.in_features // size + layer.out_features for layer in layers))
        fields |= {"r": rank, "lora_alpha": 2 * rank, "use_qalora": True, "qalora_group_size": size}
    return LoraConfig(**fields)


def train(
    base: nn.Module, training: str, task: Any, options: argparse.Namespace, config: pql.QuantConfig
) -> nn.Module:
    """A PEFT model on ``base``, which does not change; the learning rate falls from its peak along a cosine."""
    torch.manual_seed(task.options.seed)
    model = get_peft_model(copy.deepcopy(base), adapter_config(training, base, config)).train()
    if training == "aware":
        pql.enable_merge_aware(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0)
    batches = task.batches()
    for step in range(options.steps):
        warmup = min(1.0, (step + 1) / max(1, options.steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        model(**next(batches), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def merge(model: nn.Module, strategy: str, task: Any) -> tuple[nn.Module, Capture, float]:
    """The merged model, its capture, and the seconds of the merge itself."""
    way = strategy.partition(", ")[0]
    extra: dict[str, Any] = {"tune_epochs": TUNE_EPOCHS} if strategy == TUNED else {}
    if way == "calibrated":
        extra["calibration"] = task.train[:CALIBRATION_TOKENS]
    start = time.perf_counter()
    copied = copy.deepcopy(model)
    if choices := BUDGETED.get(strategy):
        extra["budget"] = pql.plan_merge_bits(
            copied, extra["calibration"], average=BUDGET, choices=choices, progress=False
        )
    if strategy == "scales":
        merged = copied.merge_and_unload()
    else:
        merged, _ = pql.merge_back(copied, strategy=cast(Any, way), **extra)
    seconds = time.perf_counter() - start
    return merged, compared(model, merged, task), seconds


def merge_by_hqq(model: nn.Module, config: pql.QuantConfig, task: Any) -> tuple[nn.Module, Capture, float]:
    """PEFT's rule for ``HQQLinear``: dequantize each weight, add the delta, quantize from scratch with ``hqq``."""
    start = time.perf_counter()
    merged, _ = pql.merge_back(copy.deepcopy(model), strategy="dense")
    names = pql.quantized_modules(model.base_model.model)
    for name in (name.removesuffix(".base_layer") for name in names):
        linear = merged.get_submodule(name)
        peer = quantize_with_hqq(linear.weight.data, nbits=config.nbits, group_size=config.group_size, axis=1)
        linear.weight.data = peer_weight(*peer).dense
    return merged, compared(model, merged, task), time.perf_counter() - start


def compared(model: nn.Module, merged: nn.Module, task: Any) -> Capture:
    def logits(candidate: nn.Module, ids: Tensor) -> Tensor:
        return candidate(ids, use_cache=False).logits

    def base(ids: Tensor) -> Tensor:
        with model.disable_adapter():
            return logits(model, ids)

    return capture(
        lambda ids: logits(model, ids), base, lambda ids: logits(merged.eval(), ids), task.held_out, window=256
    )


def adapter_mb(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6


def strategies(training: str, setting: str) -> list[str]:
    if training != "plain":
        return ["exact" if training == "qalora" else training]
    others = ["peft+hqq"] if isinstance(SETTINGS[setting], pql.HQQConfig) else ["append", TUNED]
    return ["requantize", "calibrated", *others, *(BUDGETED if setting == BUDGET_SETTING else ())]


def measure(setting: str, base: nn.Module, task: Any, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    config = SETTINGS[setting]
    for training in options.trainings:
        if training == "qalora" and not isinstance(config, pql.HQQConfig):
            continue
        model = train(base, training, task, options, config)
        score = task.score(model)
        for strategy in strategies(training, setting):
            if strategy in options.without or (options.only and strategy not in options.only):
                continue
            merged, kept, seconds = (
                merge_by_hqq(model, config, task) if strategy == "peft+hqq" else merge(model, strategy, task)
            )
            loss_base, loss_adapter, loss_merged = task.losses(model, merged, kept)
            yield Row(
                setting=setting,
                task=task.name,
                seed=seed,
                training=training,
                strategy=strategy,
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                adapter_mb=adapter_mb(model),
                capture=kept.capture,
                loss_base=loss_base,
                loss_adapter=loss_adapter,
                loss_merged=loss_merged,
                score_adapter=score,
                score_merged=task.score(merged),
                seconds_to_merge=seconds,
            )


def quantized_base(setting: str, tokenizer: Any, options: argparse.Namespace) -> nn.Module:
    """The float model in the setting's bits; calibrated on training text where the name says so."""
    base = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32)
    calibration = None
    if "calibrated" in setting:
        ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        calibration = pql.Calibration(
            data=training_part(ids, options)[len(ids) // 2 :],
            n_tokens=CALIBRATION_TOKENS,
            resume_folder=CACHE / f"{setting.replace(' ', '-')}-{options.held_out_tokens}",
        )
    return pql.quantize_model(base, SETTINGS[setting], calibration=calibration, progress=False)


def step_model(training: str, setting: str, options: argparse.Namespace) -> nn.Module:
    base = quantized_base(setting, AutoTokenizer.from_pretrained(demo_model_folder()), options)
    base.config.use_cache = False
    model = get_peft_model(base, adapter_config("plain", base, SETTINGS[setting])).train()
    if training == "aware":
        pql.enable_merge_aware(model)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """A whole step: the adapter has to change, since AQLM chooses its codes again after a few changes."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def step_costs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds (interleaved) and peak memory (a process each) of a step, plain and merge-aware, for each setting.

    Means, over whole rounds of the steps that share one choice of AQLM's codes.
    """
    for setting in options.settings:
        models = {training: step_model(training, setting, options) for training in ("plain", "aware")}
        optimizers = {training: optimizer_of(model) for training, model in models.items()}
        for tokens in options.step_tokens:
            ids = torch.randint(0, 49_000, (options.batch, tokens))
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(options.repeats + 1):
                for name, model in models.items():
                    start = time.perf_counter()
                    take_step(model, optimizers[name], ids)
                    if repeat:
                        seconds[name].append(time.perf_counter() - start)
            means = {name: statistics.mean(times) for name, times in seconds.items()}
            peaks = {name: peak_gib(setting, name, tokens, options) for name in models}
            row = {
                "setting": setting,
                "batch": options.batch,
                "tokens": tokens,
                "mean_s": means,
                "all_s": seconds,
                "time_ratio": means["aware"] / means["plain"],
                "peak_gib": peaks,
                "memory_ratio": peaks["aware"] / peaks["plain"],
            }
            print(
                f"{setting:14} {options.batch} x {tokens:4} tokens  step {means['plain']:.3f} s plain, "
                f"{means['aware']:.3f} s aware ({row['time_ratio']:.2f} x); "
                f"peak {peaks['plain']:.2f} GiB plain, {peaks['aware']:.2f} GiB aware "
                f"({row['memory_ratio']:.2f} x)",
                flush=True,
            )
            yield row


def peak_gib(setting: str, training: str, tokens: int, options: argparse.Namespace) -> float:
    """Largest resident size of a process of its own that loads the model and takes two steps."""
    shared = ("--batch", str(options.batch), "--held-out-tokens", str(options.held_out_tokens))
    return float(in_own_process("--peak-of", setting, training, str(tokens), *shared))


def print_peak(setting: str, training: str, tokens: int, options: argparse.Namespace) -> None:
    model = step_model(training, setting, options)
    optimizer = optimizer_of(model)
    reset_peak()
    for _ in range(2):
        take_step(model, optimizer, torch.randint(0, 49_000, (options.batch, tokens)))
    print(resident_bytes("VmHWM") / 2**30)


def show(row: Row) -> None:
    scores = "" if row.score_adapter is None else f"  score {row.score_adapter:.0%} -> {row.score_merged:.0%}"
    print(
        f"{row.setting:14} {row.task:6} seed {row.seed}  {row.training:6} {row.strategy:10}  "
        f"capture {row.capture:6.3f}  loss {row.loss_base:.3f} -> {row.loss_adapter:.3f}, merged "
        f"{row.loss_merged:.3f}{scores}"
        f"  ({row.trained_parameters / 1e6:.2f} M trained, {row.adapter_mb:.1f} MB, "
        f"merged in {row.seconds_to_merge:.0f} s)",
        flush=True,
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in ("setting", "task", "training", "strategy")), []).append(row)
    print(
        f"\n{'setting':15}{'task':8}{'training':10}{'strategy':12}{'capture':>9}{'base':>8}{'adapter':>9}{'merged':>8}"
    )
    for names, group in groups.items():
        means = [statistics.mean(row[name] for row in group) for name in ("capture", *LOSSES)]
        print(
            f"{names[0]:15}{names[1]:8}{names[2]:10}{names[3]:12}{means[0]:9.3f}"
            + "".join(f"{m:8.3f} " for m in means[1:])
        )


LOSSES = ("loss_base", "loss_adapter", "loss_merged")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one setting and seed, few steps")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--only", nargs="+", default=[], help="strategies to measure; all without")
    parser.add_argument("--without", nargs="+", default=[], help="strategies to leave out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a training example of the text task")
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--orders", type=int, default=48, help="held-out orders")
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=2 * STEPS_PER_CHOICE)
    parser.add_argument("--only-steps", action="store_true", help="measure the costs of a step and nothing else")
    parser.add_argument("--skip-steps", action="store_true", help="measure merges only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.settings, options.seeds, options.steps = options.settings[:1], [0], 10
        options.batch, options.tokens, options.held_out_tokens, options.orders = 2, 64, 1024, 8
        options.step_tokens, options.repeats = [128], 2
        if options.output == RESULTS:
            options.output = Path(tempfile.gettempdir(), "merge_quick.json")
    return options


def main() -> None:
    options = parse_options()
    if options.peak_of:
        setting, training, tokens = options.peak_of
        return print_peak(setting, training, int(tokens), options)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    results = Results(options)
    for step in [] if options.skip_steps else step_costs(options):
        results.add("steps", step)
    for setting in [] if options.only_steps else options.settings:
        base = quantized_base(setting, tokenizer, options)
        for name, seed in itertools.product(options.tasks, options.seeds):
            options.seed = seed
            for row in measure(setting, base, TASKS[name](tokenizer, options, seed), seed, options):
                show(row)
                results.add("rows", asdict(row))
    print_table(results.found["rows"])


class Results:
    """The result file, to which rows are added as they come; a row that is measured again replaces the old one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.output
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        shared = ("steps", "lr", "batch", "tokens", "held_out_tokens", "orders")
        training = {name: getattr(options, name) for name in shared}
        if known and known["training"] != training:
            raise SystemExit(f"{self.path} holds rows of other options, {known['training']}: give another --output.")
        model = "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1"
        self.found: dict[str, Any] = {
            "device": describe_device(),
            "model": model,
            "training": training,
            "steps": known.get("steps", []),
            "rows": known.get("rows", []),
        }

    def add(self, table: str, row: dict[str, Any]) -> None:
        rows = {tuple(each[field] for field in KEYS[table]): each for each in self.found[table]}
        rows[tuple(row[field] for field in KEYS[table])] = row
        self.found[table] = list(rows.values())
        self.path.write_text(json.dumps(self.found, indent=2) + "\n")


KEYS = {"rows": ("setting", "task", "seed", "training", "strategy"), "steps": ("setting", "batch", "tokens")}


if __name__ == "__main__":
    main()
