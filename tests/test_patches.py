"""The patches as mails, and the list of them; `make patches` applies them and runs their tests."""

import email
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "patches"
PATCHES = sorted(FOLDER.glob("*/*.patch"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.parent.name}/{patch.name[:4]}")
def test_a_patch_is_a_mail_with_a_title_and_a_neutral_author(patch):
    mail = email.message_from_string(patch.read_text())
    assert mail["From"] == "peft_quantlayers contributors <noreply@example.com>"
    assert mail["Date"]
    title = " ".join(mail["Subject"].split()).removeprefix("[PATCH] ")
    assert re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") == patch.stem[5:]
    assert mail.get_payload().lstrip().startswith("diff --git ")


def test_the_readme_has_a_row_for_every_patch_of_every_series():
    sections = re.split(r"^## ", (FOLDER / "README.md").read_text(), flags=re.M)
    listed = {}
    for section in sections:
        numbers = re.findall(r"^\| `(\d{4})` ", section, re.M)
        if numbers:
            listed[section.splitlines()[0].lower().replace(" ", "-")] = numbers
    assert listed == {
        folder.name: [patch.name[:4] for patch in sorted(folder.glob("*.patch"))]
        for folder in sorted({patch.parent for patch in PATCHES})
    }
