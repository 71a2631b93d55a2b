"""Damaged files and configs are refused, said, or without effect; none hangs, crashes or changes a result silently.

60 cases of each, or as many as FUZZ_CASES says; ``make fuzz`` takes 600. The seed of a case is its number: run one
with FUZZ_ONLY=17.
"""

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers.utils import logging

from . import corrupt, hostile
from .forked import Outcome, run_forked
from .subjects import SUBJECTS, Subject, digest_of, write_subjects

N_CASES = int(os.environ.get("FUZZ_CASES", "60"))
CASES = [int(os.environ["FUZZ_ONLY"])] if "FUZZ_ONLY" in os.environ else range(N_CASES)
ALLOWED = {"refused by us", "refused by others", "equal", "warned", "other values"}


@dataclass(frozen=True)
class Case:
    number: int
    subject: str
    what: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.number:4} {self.kind:20} {self.subject:20} {self.what} {self.message[:300]}"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """The folder of all subjects, and what each computes and says undamaged."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("fuzz") / "subjects"
    write_subjects(folder)
    expected = {}
    for subject in SUBJECTS:
        outcome = run_forked(lambda subject=subject: digest_of(subject.load(folder / subject.name)))
        assert outcome.kind == "returned", outcome
        expected[subject.name] = outcome
    yield folder, expected
    logging.enable_progress_bar()


def kind_of(outcome: Outcome, expected: Outcome, *, may_differ: bool) -> str:
    """ "equal", "warned" or "silent" for what returned; "other values" where no user could have noticed."""
    if outcome.kind != "returned":
        return outcome.kind
    if outcome.value == expected.value:
        return "equal"
    if lines(outcome) - lines(expected):
        return "warned"
    return "other values" if may_differ else "silent"


def lines(outcome: Outcome) -> set[str]:
    return {line.strip() for line in outcome.told.splitlines() if line.strip()}


def report(cases: list[Case]) -> None:
    """Print the table, and fail with the cases that may not be."""
    print()
    for kind, count in Counter(case.kind for case in cases).most_common():
        print(f"{count:5} {kind}")
    bad = [str(case) for case in cases if case.kind not in ALLOWED or "FUZZ_ONLY" in os.environ]
    assert not bad, "\n".join(bad)


def damaged_copy(folder: Path, subject: Subject, scratch: Path, number: int) -> Path:
    return Path(shutil.copytree(folder / subject.name, scratch / str(number) / subject.name))


def test_damaged_files(subjects, tmp_path):
    folder, expected = subjects
    cases = []
    for number in CASES:
        rng = random.Random(number)
        subject, said = rng.choice(SUBJECTS), None
        copy = damaged_copy(folder, subject, folder.parent, number)
        while said is None:
            damage = rng.choice(corrupt.VALUES if rng.random() < 0.4 else corrupt.OTHERS)
            said = damage(copy, rng)
        outcome = run_forked(lambda subject=subject, copy=copy: digest_of(subject.load(copy)))
        may_differ = damage in corrupt.VALUES and not subject.has_checksums
        kind = kind_of(outcome, expected[subject.name], may_differ=may_differ)
        cases.append(Case(number, subject.name, f"{damage.__name__}: {said}", kind, outcome.message))
        shutil.rmtree(copy.parent)
    report(cases)


def test_hostile_configs(subjects, tmp_path):
    folder, expected = subjects
    cases = []
    for number in CASES:
        rng = random.Random(number)
        subject = rng.choice(SUBJECTS)
        copy = damaged_copy(folder, subject, tmp_path, number)
        said, field = hostile.damage_config(copy / subject.config, rng)
        outcome = run_forked(lambda subject=subject, copy=copy: digest_of(subject.load(copy)))
        may_differ = field in hostile.MEANT if subject.base else subject.name == "hqq_package_folder"
        kind = kind_of(outcome, expected[subject.name], may_differ=may_differ)
        cases.append(Case(number, subject.name, said, kind, outcome.message))
    report(cases)
