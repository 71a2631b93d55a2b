"""What ``peft_quantlayers.evaluate`` offers, and that the package downloads nothing by itself."""

import ast
from pathlib import Path

import peft_quantlayers
from peft_quantlayers import evaluate

PACKAGE = Path(peft_quantlayers.__file__).parent


def test_the_public_names_are_these():
    models = ["capture", "divergence", "perplexity", "routing_agreement", "saved_for_backward"]
    assert evaluate.__all__ == ["Capture", "Divergence", "RoutingAgreement", *models]


def test_no_file_of_the_package_starts_another_program():
    # This Python with a time limit, to try an expression that came with an adapter; and converters of engines.
    allowed = {PACKAGE / "integrations" / "pattern_check.py", PACKAGE / "exports" / "own_process.py"}
    for file in set(PACKAGE.rglob("*.py")) - allowed:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert "subprocess" not in [alias.name for alias in node.names], file
            elif isinstance(node, ast.ImportFrom):
                assert node.module != "subprocess", file
