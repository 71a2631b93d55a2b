"""The patches as mails, their texts, and the lists of them; `make patches` applies them and runs their tests."""

import email
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "patches"
PATCHES = sorted(FOLDER.glob("*/*/*.patch"))
SERIES = sorted({patch.parent for patch in PATCHES})
README = (FOLDER / "README.md").read_text()

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.parent.name}/{patch.name[:4]}")
each_series = pytest.mark.parametrize("series", SERIES, ids=lambda series: f"{series.parent.name}/{series.name}")


def subject(patch: Path) -> str:
    mail = email.message_from_string(patch.read_text())
    return " ".join(mail["Subject"].split()).removeprefix("[PATCH] ")


def added_lines(patch: Path) -> dict[str, list[str]]:
    """What a patch adds, by file."""
    found: dict[str, list[str]] = {}
    for line in patch.read_text().splitlines():
        if line.startswith("+++ b/"):
            lines = found.setdefault(line.removeprefix("+++ b/"), [])
        elif line.startswith("+"):
            lines.append(line[1:])
    return found


def new_files(patch: Path) -> list[str]:
    return re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", patch.read_text(), re.M)


@each_patch
def test_a_patch_is_a_mail_with_a_body_and_a_neutral_author(patch):
    mail = email.message_from_string(patch.read_text())
    assert mail["From"] == "peft_quantlayers contributors <noreply@example.com>"
    assert mail["Date"]
    body, _, diff = mail.get_payload().partition("diff --git ")
    assert len(body.split()) > 8
    assert diff
    assert re.sub(r"[^A-Za-z0-9.]+", "-", subject(patch)).startswith(patch.stem[5:].rstrip("-"))


@each_patch
def test_a_patch_changes_code_and_tests(patch):
    files = list(added_lines(patch))
    assert any(file.startswith("src/") for file in files)
    assert any(re.fullmatch(r"tests/(?:\w+/)*test_\w+\.py", file) for file in files)


@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch.parent.parent.name == "peft"])
def test_a_patch_of_peft_follows_its_guide(patch):
    """Prefixed titles, tests where tests are, no imports from the future, and the issue in the test of each bug."""
    assert re.match(r"(FIX|ENH|FEAT|DOC) ", subject(patch))
    assert new_files(patch) == []
    added = added_lines(patch)
    assert not any("from __future__" in line for lines in added.values() for line in lines)
    if subject(patch).startswith("FIX ") or "all-linear" in subject(patch):
        assert any("see #NNNN" in line for file, lines in added.items() for line in lines if file.startswith("tests/"))


@each_series
def test_a_series_has_a_text_to_paste_that_says_why_what_was_run_and_that_ai_was_used(series):
    (text,) = series.glob("*.md")
    words = text.read_text()
    assert {"pr.md", "comment.md"} & {text.name}
    assert re.search(r"\bAI\b", words)
    assert "pytest tests/" in words
    assert "RESULT" in words
    assert "LINK" in words


@pytest.mark.parametrize("series", [series for series in SERIES if series.parent.name == "peft"])
def test_a_pull_request_of_peft_names_the_issue_and_documents_new_public_names(series):
    title, *_ = (series / "pr.md").read_text().splitlines()
    assert re.match(r"# (FIX|ENH) \S", title)
    assert "#NNNN" in (series / "pr.md").read_text()
    added = [added_lines(patch) for patch in series.glob("*.patch")]
    exported = {
        name
        for files in added
        for file, lines in files.items()
        if file.endswith("__init__.py")
        for name in re.findall(r'^    "(\w+)",$', "\n".join(lines), re.M)
    }
    docs = "\n".join(
        line for files in added for file, lines in files.items() if file.startswith("docs/") for line in lines
    )
    assert {name for name in exported if name not in docs} == set()


@pytest.mark.parametrize("project", ["peft", "transformers"])
def test_an_issue_has_the_fields_of_the_form_for_bugs_and_says_that_ai_was_used(project):
    issue = (FOLDER / project / "issue.md").read_text()
    assert re.findall(r"^### (.+)$", issue, re.M) == [
        "System Info", "Who can help?", "Reproduction", "Expected behavior"
    ]  # fmt: skip
    assert "*Disclosure: an AI agent " in issue


def test_the_issue_has_a_reproduction_for_every_row_of_its_table():
    issue = (FOLDER / "peft" / "issue.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\]\(#(\S+)\) \|$", issue, re.M)
    sections = re.findall(r"^#### (\d+): (.+?)\n\n```python\n(.+?)```", issue, re.M | re.S)
    assert [number for number, _ in rows] == [number for number, _, _ in sections] == [str(n) for n in range(1, 9)]
    assert [anchor for _, anchor in rows] == [f"{n}-{title.lower()}" for n, title, _ in sections]
    for _, _, code in sections:
        assert len(code.splitlines()) <= 5
        compile(code, "reproduction", "exec")


def test_the_readme_has_a_row_for_every_series_and_text():
    listed = re.findall(r"^\| \d+ \| .+\]\((\S+)\) \| (?:`(\S+)`)? ?\|", README, re.M)
    texts = {(FOLDER / text).resolve() for text, _ in listed}
    assert texts == {path.resolve() for path in FOLDER.rglob("*.md")} - {FOLDER.resolve() / "README.md"}
    assert {FOLDER / series for _, series in listed if series} == set(SERIES)


def test_every_patch_that_our_code_or_its_documentation_names_is_there():
    files = [*ROOT.glob("peft_quantlayers/**/*.py"), *ROOT.glob("tests/conformance/*.toml"), *ROOT.glob("*.md")]
    named = {name for file in files for name in re.findall(r"patches/(\w+/[\w-]+)", file.read_text())}
    assert named
    assert named <= {f"{series.parent.name}/{series.name}" for series in SERIES}


@pytest.mark.parametrize("series", [series for series in SERIES if series.parent.name == "peft"])
def test_no_tuner_of_peft_names_the_resolver_of_backends_unless_it_supports_them(series):
    """PEFT's `scripts/generate_method_capabilities.py` takes the name in a tuner's source for support of them all."""
    for patch in series.glob("*.patch"):
        for file, lines in added_lines(patch).items():
            if file.startswith("src/peft/tuners/"):
                assert "resolve_quantization_backend" not in "\n".join(lines), file
