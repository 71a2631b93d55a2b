"""The pages of ``docs/``: every block of code runs, in the order of its page, and pages name what is there."""

import json
import re
import textwrap
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from hub import tiny_hub
from programs import run_program
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from peft_quantlayers.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# Their blocks are run by tests/test_contributing.py and tests/test_distributed_page.py.
TESTED_ELSEWHERE = {"new_method.md", "distributed.md"}
# Words that a reader looks for, and the page that has the answer.
SEARCHES = {
    "merge": "merging/",
    "resume": "resuming/",
    "memory": "larger-than-memory/",
    "fsdp2": "distributed/",
    "lm-eval": "evaluating/",
    "quantize_checkpoint": "reference/",
}
FENCES = re.compile(r"^```(\w*)", re.M)


class ShellBlocks(CodeBlockParser):
    """Commands of ours; what pip and other programs would do is left out."""

    language = "sh"

    def evaluate(self, example: Example) -> None:
        for line in example.parsed.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["pql"] and words[1] != "run":
                assert main(words[1:]) == 0, line


def runnable(page: str) -> bool:
    return page not in TESTED_ELSEWHERE and bool({"python", "sh"} & set(FENCES.findall((DOCS / page).read_text())))


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tiny_hub(tmp_path / "hub")))
    words = (ROOT / "benchmarks" / "data" / "wikitext2-test.txt").read_text()[:20_000]
    # A prompt is a line, a token of the tiny stand-in is a byte, and it has few positions.
    Path("notes.txt").write_text("\n".join(textwrap.fill(line, 400) for line in words.splitlines()))
    document = Sybil([PythonCodeBlockParser(), ShellBlocks()]).parse(DOCS / page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


def test_the_site_is_built_without_a_warning(tmp_path):
    done = run_program("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "peft_quantlayers.merge_back" in page
    assert ":func:" not in page
    # What a reader types into the search is in a title of the page that he is to find.
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text())["docs"]
    for query, wanted in SEARCHES.items():
        found = {entry["location"].partition("#")[0] for entry in index if query in entry["title"].lower()}
        assert wanted in found, query


def test_the_navigation_has_every_page():
    def files(entry):
        return (
            [entry]
            if isinstance(entry, str)
            else [file for each in entry for value in each.values() for file in files(value)]
        )

    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(files(yaml.safe_load(text)["nav"])) == PAGES


def test_the_reference_has_every_public_name():
    import peft_quantlayers as pql

    listed = {
        line.rsplit(".", 1)[-1] for line in re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.M)
    }
    assert set(pql.__all__) - listed == set()


def test_every_quoted_error_is_one_that_the_code_gives():
    code = " ".join(file.read_text() for file in (ROOT / "peft_quantlayers").rglob("*.py"))
    code = re.sub(r'"\s*(?:\+\s*)?f?"', "", code)
    quoted = re.findall(r'^\*\*(?:[^*"]*)"([^"]+)"', (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 5
    assert [text for text in quoted if text not in code] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_link_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / page).read_text())
    assert [link for link in links if not (DOCS / link).exists()] == []
