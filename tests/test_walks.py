"""The counts of `benchmarks/walks.py`: what is a call, a file and a hop, and that a journey is always the same."""

import json
import sys
from pathlib import Path

import pytest
import walks

RESULTS = Path(walks.__file__).parent / "results"


def test_calls_files_and_hops_are_counted(tmp_path, monkeypatch):
    (tmp_path / "walked_inner.py").write_text("def one():\n    pass\n")
    (tmp_path / "walked_outer.py").write_text(
        "import walked_inner\n\ndef own():\n    pass\n\ndef three():\n    walked_inner.one()\n    own()\n    own()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(walks, "ROOMS", (str(tmp_path),))
    import walked_outer

    found = walks.counted("made up", walked_outer.three)
    assert found == walks.Walk(journey="made up", calls=4, our_calls=4, our_files=2, hops=2)
    monkeypatch.setattr(walks, "ROOMS", (str(tmp_path / "walked_inner.py"),))
    found = walks.counted("made up", walked_outer.three)
    assert found == walks.Walk(journey="made up", calls=4, our_calls=1, our_files=1, hops=0)
    assert sys.getprofile() is None


@pytest.mark.parametrize("name", list(walks.JOURNEYS)[:8])
def test_a_journey_of_one_layer_takes_as_many_calls_each_time(name: str):
    first, second = walks.walk(name), walks.walk(name)
    assert first == second
    assert first.calls >= first.our_calls >= first.our_files >= 1


@pytest.mark.parametrize("name", list(walks.JOURNEYS)[:8])
def test_a_journey_of_one_layer_takes_no_more_calls_than_are_published(name: str):
    published = {found["journey"]: found for found in json.loads((RESULTS / "walks_after.json").read_text())["walks"]}
    assert (
        walks.walk(name).our_calls <= 1.1 * published[name]["our_calls"]
    )  # run benchmarks/walks.py where more is right


def test_the_counts_before_are_of_the_same_journeys():
    before = json.loads((RESULTS / "walks_before.json").read_text())
    assert [found["journey"] for found in before["walks"]] == list(walks.JOURNEYS)
