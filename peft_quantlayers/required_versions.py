"""Importing this checks the versions of the packages that ours stands on, before theirs fail without the reason."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

PACKAGE = "peft_quantlayers"
CHECKED = ("torch", "transformers", "peft", "accelerate")


def check_required_versions() -> None:
    """Raise ImportError where a package is older than ``pyproject.toml`` says; newer ones are tried.

    Nothing is checked in a checkout that is not installed.
    """
    try:
        wanted = [Requirement(line) for line in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        return
    for each in wanted:
        if each.name not in CHECKED or each.marker is not None:
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            continue  # its import says so
        lowest = [bound for bound in each.specifier if bound.operator == ">="]
        if not all(bound.contains(found, prereleases=True) for bound in lowest):
            raise ImportError(
                f"{PACKAGE} needs {each.name} {each.specifier}, and {found} is installed. Install a newer one: "
                f'pip install "{each.name}{each.specifier}".'
            )


check_required_versions()
