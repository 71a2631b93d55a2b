"""The toy method is registered for every test of this folder."""

import pytest
from every_method import METHODS, quick_spec

from peft_quantlayers import QuantMethod, QuantSpec
from peft_quantlayers.methods import get_method


@pytest.fixture(autouse=True)
def _toy(toy_method) -> None:
    pass


@pytest.fixture(params=METHODS)
def method(request, _toy) -> QuantMethod:
    return get_method(request.param)


@pytest.fixture
def spec(method) -> QuantSpec:
    return quick_spec(method.spec_type.method)
