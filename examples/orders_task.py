"""A small task for the examples: turn an order written as a sentence into a record.

``Please send three red lamps to Oslo by Friday.`` becomes ``lamp/red*3>oslo@fri``. The format is made up here, so no
model knows it, and every sentence is put together from the word lists below: no data set is needed.
"""

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
ITEMS = ("lamp", "chair", "table", "kettle", "pillow", "bottle", "basket", "mirror")
CITIES = ("Oslo", "Paris", "Madrid", "Vienna", "London", "Berlin", "Dublin", "Lisbon")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
SENTENCES = (
    "Please send {number} {colour} {item}s to {city} by {day}.",
    "We need {number} {colour} {item}s in {city} on {day}.",
    "{city} is waiting for {number} {colour} {item}s, at the latest on {day}.",
    "By {day} the shop in {city} wants {number} {colour} {item}s.",
)
IGNORED = -100  # the label that transformers' loss leaves out


@dataclass(frozen=True)
class Order:
    """One example: the prompt a model gets, and the answer it should give."""

    prompt: str
    answer: str


def make_orders(n_train: int, n_test: int, *, seed: int = 0) -> tuple[list[Order], list[Order]]:
    """Orders to train on and held-out ones; no order is in both, in whatever sentence."""
    generator = random.Random(seed)
    facts = list(product(NUMBERS, COLOURS, ITEMS, CITIES, DAYS))
    orders = [_order(generator.choice(SENTENCES), *fact) for fact in generator.sample(facts, n_train + n_test)]
    return orders[:n_train], orders[n_train:]


def _order(sentence: str, number: str, colour: str, item: str, city: str, day: str) -> Order:
    text = sentence.format(number=number, colour=colour, item=item, city=city, day=day)
    count = NUMBERS.index(number) + 2
    return Order(
        prompt=f"{text}\nRecord (item/colour*count>city@day):",
        answer=f" {item}/{colour}*{count}>{city.lower()}@{day[:3].lower()}",
    )


def tokenize(orders: list[Order], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Examples for a Trainer; only the answer and the end of text count in the loss."""
    examples = []
    for order in orders:
        prompt = tokenizer(order.prompt).input_ids
        answer = [*tokenizer(order.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return examples


class OrderCollator:
    """Pads a batch on the right. Padding is neither attended to nor counted in the loss."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad_token_id = tokenizer.eos_token_id

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        return {
            "input_ids": padded([example["input_ids"] for example in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, orders: list[Order], *, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of an answer token, in nats."""
    model.eval()
    collate, examples = OrderCollator(tokenizer), tokenize(orders, tokenizer)
    total = n_tokens = 0.0
    for start in tqdm(range(0, len(examples), batch_size), desc="Task loss", unit="batch"):
        batch = {
            name: tensor.to(model.device) for name, tensor in collate(examples[start : start + batch_size]).items()
        }
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum").item()
        n_tokens += int((labels != IGNORED).sum())
    return total / n_tokens


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, orders: list[Order], *, batch_size: int = 32) -> list[str]:
    """What the model writes for each order, decoded greedily, up to the first line break."""
    model.eval()
    max_new_tokens = max(len(tokenizer(order.answer).input_ids) for order in orders) + 2
    answers: list[str] = []
    for start in tqdm(range(0, len(orders), batch_size), desc="Answers", unit="batch"):
        prompts = [tokenizer(order.prompt).input_ids for order in orders[start : start + batch_size]]
        length = max(map(len, prompts))  # padded on the left: all answers start at the same column
        pad = tokenizer.eos_token_id
        written = model.generate(
            input_ids=torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts], device=model.device),
            attention_mask=torch.tensor(
                [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device
            ),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        answers += [text.strip().split("\n")[0] for text in texts]
    return answers


def exact_match(model: Any, tokenizer: Any, orders: list[Order], *, batch_size: int = 32) -> float:
    """Fraction of the orders whose record the model writes without a mistake, 0 to 1."""
    answers = write_answers(model, tokenizer, orders, batch_size=batch_size)
    return sum(answer == order.answer.strip() for answer, order in zip(answers, orders, strict=True)) / len(orders)
