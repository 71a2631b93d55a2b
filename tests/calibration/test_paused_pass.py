"""Passes that wait: torch's settings and context variables are their own, and they end cleanly."""

import contextvars

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from peft_quantlayers.calibration.paused_pass import Pass, TorchSettings, replaced_forwards


class Counting(TorchFunctionMode):
    """Counts calls of torch functions."""

    n_calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.n_calls += 1
        return function(*args, **(kwargs or {}))


SETTINGS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "function mode": Counting,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("outside", SETTINGS)
@pytest.mark.parametrize("inside", SETTINGS)
def test_settings_of_a_pass_and_of_its_caller_stay_apart(outside, inside):
    """Two passes in turn, the first of which ends before the other."""
    seen = []

    def computation(name):
        start = TorchSettings.now()
        with SETTINGS[inside]():
            inner = TorchSettings.now()
            Pass.current().pause(None)
            seen.append((name, TorchSettings.now() == inner, torch.is_inference_mode_enabled() == inner.is_inference))
            Pass.current().pause(None)
            assert TorchSettings.now() == inner
        assert TorchSettings.now() == start

    plain = TorchSettings.now()
    with SETTINGS[outside]():
        here = TorchSettings.now()
        passes = [Pass(lambda name=name: computation(name)) for name in ("first", "second")]
        for _ in range(2):
            for each in passes:
                each.resume()
                assert TorchSettings.now() == here
    for each in passes:  # from other settings than where they began
        each.resume()
        assert each.dead
        assert TorchSettings.now() == plain
    assert seen == [("first", True, True), ("second", True, True)]


def test_inference_mode_of_a_paused_pass_does_not_reach_its_caller():
    def computation():
        with torch.inference_mode():
            Pass.current().pause(None)
            return torch.ones(1).is_inference()

    each = Pass(computation)
    each.resume()
    weight = torch.ones(1, requires_grad=True)
    (weight * 2).backward()
    assert weight.grad == 2
    assert each.resume() is True
    assert not torch.ones(1).is_inference()


def test_casts_of_autocast_do_not_outlive_a_pause():
    """Autocast keeps the cast of a weight that needs a gradient; the weight is changed while the pass waits."""
    layer = nn.Linear(4, 4, bias=False)

    def computation():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(torch.ones(1, 4))
            Pass.current().pause(None)
            return layer(torch.ones(1, 4))

    each = Pass(computation)
    each.resume()
    layer.weight.data.zero_()
    assert not each.resume().any()


def test_context_variables_of_a_pass_are_those_of_where_it_was_made():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(1)

    def computation():
        found = [variable.get()]
        variable.set(2)
        Pass.current().pause(None)
        return [*found, variable.get()]

    each = Pass(computation)
    each.resume()
    assert variable.get() == 1
    variable.set(3)
    assert each.resume() == [1, 2]


def test_values_go_in_and_out_and_errors_come_out():
    def computation():
        with torch.autocast("cpu", dtype=torch.float16), Counting():
            given = Pass.current().pause("first")
            torch.set_grad_enabled(False)  # left behind
            raise RuntimeError(f"with {given}")

    before = TorchSettings.now()
    each = Pass(computation)
    assert each.resume() == "first"
    with pytest.raises(RuntimeError, match="with second"):
        each.resume("second")
    assert each.dead
    assert TorchSettings.now() == before


def test_closing_ends_a_pass_where_it_waits_in_its_own_settings():
    ended = []

    def computation():
        try:
            with torch.inference_mode():
                try:
                    Pass.current().pause(None)
                except Exception:  # what a model catches does not keep a pass alive
                    ended.append("caught")
                finally:
                    ended.append(torch.is_inference_mode_enabled())
        finally:
            ended.append(torch.is_inference_mode_enabled())

    before = TorchSettings.now()
    each = Pass(computation)
    each.close()
    assert not ended
    each = Pass(computation)
    each.resume()
    each.close()
    assert each.dead
    assert ended == [True, False]
    assert TorchSettings.now() == before


def test_forwards_are_replaced_for_a_while_also_those_of_an_instance():
    plain, wrapped = nn.Linear(2, 2), nn.Linear(2, 2)
    own = wrapped.forward = lambda x: x + 1

    def interrupted() -> None:
        with replaced_forwards({plain: lambda x: 5, wrapped: lambda x: 6}):
            assert (plain(0), wrapped(0)) == (5, 6)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "forward" not in vars(plain)
    assert wrapped.forward is own


class Overriding(torch.Tensor):
    """A tensor whose functions run ``inside``."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls.inside()


class Applied(torch.autograd.Function):
    """An autograd function that runs what it is given."""

    @staticmethod
    def forward(ctx, x, inside):
        return inside()


def override(inside):
    Overriding.inside = inside
    return torch.relu(torch.ones(1).as_subclass(Overriding))


BELOW_TORCH = {
    "override": override,
    "autograd function": lambda inside: Applied.apply(torch.ones(1), inside),
    "reentrant checkpoint": lambda inside: checkpoint(lambda x: inside(), torch.ones(1), use_reentrant=True),
}


@pytest.mark.parametrize("kind", BELOW_TORCH)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_pass_does_not_wait_below_a_function_of_torch(kind):
    """Pointers of that function to its call stack would outlive it: the next warning of torch would crash."""

    def inside():
        current = Pass.current()
        assert not current.can_pause
        current.pause(1)

    def computation():
        assert Pass.current().can_pause
        BELOW_TORCH[kind](inside)

    each = Pass(computation)
    with pytest.raises(RuntimeError, match="from within a function of torch"):
        each.resume()
    assert each.dead
