"""Options in YAML files under other programs' names, wherever on the line the file is named."""

import pytest
import yaml

from quantlayers_cli.names import with_names

KNOWN = {"model", "output", "nbits", "group_size"}
LINES = [
    ["FILE", "--model", "M", "--output", "O"],
    ["M", "O", "--config", "FILE"],
    ["M", "O", "--config=FILE"],
    ["--model", "M", "--config", "FILE", "--output", "O"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_an_alias_in_a_file_is_renamed_in_its_own_place(line, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("bits: 4\n")
    given = [argument.replace("FILE", str(file)) for argument in line]
    found = with_names(given, ["model", "output"], KNOWN, ["model", "output"])
    found = [part for argument in found for part in (argument.split("=", 1) if "=" in argument else [argument])]
    options = dict(zip(found[::2], found[1::2], strict=True))
    assert (options["--model"], options["--output"]) == ("M", "O")
    assert yaml.safe_load(options["--config"]) == {"nbits": 4}


def test_two_files_keep_their_contents(tmp_path):
    files = []
    for name, line in (("one", "bits: 4"), ("two", "base_model: M")):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"{line}\n")
    with_both = ["M", "O", "--config", str(files[0]), "--config", str(files[1])]
    found = with_names(with_both, ["model", "output"], KNOWN)
    contents = [found[place + 1] for place, argument in enumerate(found) if argument == "--config"]
    assert yaml.safe_load(contents[0]) == {"nbits": 4}
    assert yaml.safe_load(contents[1]) == {"model": "M"}
