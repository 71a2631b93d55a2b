"""Every test here runs over all variants of all registered methods, and of a toy one.

A fixture gives the config; ``method`` and ``spec`` are those that it names.
"""

import pytest
from every_method import VARIANTS

from peft_quantlayers import QuantConfig, QuantMethod, QuantSpec
from peft_quantlayers.methods import get_method


@pytest.fixture(autouse=True)
def _toy(toy_method) -> None:
    pass


@pytest.fixture(params=VARIANTS)
def config(request) -> QuantConfig:
    return VARIANTS[request.param]


@pytest.fixture
def method(config, _toy) -> QuantMethod:
    return get_method(config.spec_type.method)


@pytest.fixture
def spec(config) -> QuantSpec:
    return config.spec_for("layer")
