"""The walk: every layer gets statistics of what it really reads, from the blocks as they are by then."""

import _thread
import copy
import gc
import signal
import time

import pytest
import torch
from integrations.tiny import tiny_model
from torch import Tensor, nn

from peft_quantlayers import Calibration, HQQConfig
from peft_quantlayers.calibration import (
    BlockWork,
    InputGroup,
    InputStatistics,
    Visitor,
    block_source,
    layer_passes,
    walk,
)
from peft_quantlayers.calibration.blocks import Call
from peft_quantlayers.calibration.paused_pass import Pass
from peft_quantlayers.layers import quantizable_modules
from peft_quantlayers.layers.replace import linear_of

IDS = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(0))
DATA = Calibration(data=IDS, n_tokens=160, sequence_length=40, batch_size=2, damping=1e-6, shrinkage=0.0)


def inputs_by_layer(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What each layer reads in a plain forward pass of the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


class Recorder(Visitor):
    statistics = ("second_moment",)

    def __init__(self, calibration: Calibration = DATA) -> None:
        self.calibration = calibration
        self.hessians: dict[str, Tensor | None] = {}
        self.blocks: list[str] = []

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        options = {"damping": self.calibration.damping, "shrinkage": self.calibration.used_shrinkage}
        self.hessians[name] = None if statistics is None else statistics.hessian(**options)

    def finish_block(self, block: str, names: list[str], work: BlockWork) -> None:
        self.blocks.append(block)


def waiting_passes() -> list[Pass]:
    """Passes that have not come to an end anywhere in this process."""
    return [each for each in gc.get_objects() if type(each) is Pass and each]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma3", "gpt2", "bert"])
def test_second_moments_are_those_of_a_plain_forward_pass(family):
    model = tiny_model(family)
    model.train()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    recorder = Recorder()
    walk(model, names, DATA, recorder, progress=False)
    assert model.training
    assert set(recorder.hessians) == set(names)
    assert len(recorder.blocks) == 2
    for name, x in inputs_by_layer(model.eval(), names, IDS).items():
        if len(x) < 160:  # a pooler reads one token of each sequence
            x = x.repeat(160 // len(x), 1)
        torch.testing.assert_close(recorder.hessians[name], x.t() @ x / 160, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["changed", "replaced"])
@pytest.mark.parametrize("waiting_bytes", [0, 30_000, 1 << 29])
def test_layers_after_a_changed_one_read_what_it_gives_now(is_replaced, waiting_bytes, monkeypatch):
    class Halve(Recorder):
        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            super().visit(name, statistics)
            halved = copy.deepcopy(model.get_submodule(name)) if is_replaced else model.get_submodule(name)
            halved.weight.data.mul_(0.5)
            model.set_submodule(name, halved)

    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    model = tiny_model()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    halve = Halve()
    walk(model, names, DATA, halve, progress=False)
    for name, x in inputs_by_layer(model, names, IDS).items():
        torch.testing.assert_close(halve.hessians[name], x.t() @ x / 160, rtol=1e-3, atol=1e-6)


class Experts(nn.Module):
    """Three layers in an order of its own for each batch, each only where the batch asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        experts = (self.first, self.second, self.third)
        for index in x[0, -3:].int().tolist():
            if index >= 0:
                x = x + experts[index](x)
        return x


@pytest.mark.parametrize("waiting_bytes", [0, 1 << 29])
def test_each_batch_has_its_own_order_and_its_own_layers(waiting_bytes, monkeypatch):
    """Each layer sees what the layers give that are done by then, as if every pass started from the beginning."""

    class Negate(Recorder):
        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            inputs = []
            for batch in batches:
                handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
                model(batch)
                handle.remove()
            x = torch.cat(inputs)
            expected = x.t() @ x / len(x)
            expected.diagonal().add_(1e-6 * expected.diagonal().mean())
            super().visit(name, statistics)
            torch.testing.assert_close(self.hessians[name], expected, rtol=1e-4, atol=1e-5)
            model.get_submodule(name).weight.data.neg_()

    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    torch.manual_seed(0)
    model, batches = Experts(), [torch.randn(12, 8) for _ in range(5)]
    for batch, order in zip(batches, [(0, 1, 2), (2, 1, 0), (1, -1, -1), (0, 2, -1), (1, 0, 2)], strict=True):
        batch[0, -3:] = torch.tensor(order)
    names, negate = ["first", "second", "third"], Negate()
    walk(model, names, Calibration(data=batches, damping=1e-6, shrinkage=0.0), negate, progress=False)
    assert list(negate.hessians) == names


def test_passes_that_wait_end_with_the_walk_and_bring_back_what_went_wrong():
    class Refuses(Recorder):
        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            raise RuntimeError("of the visitor")

    class Fails(Recorder):
        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            model.get_submodule(name).weight.data = torch.zeros(1, 1)

    model = tiny_model()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="of the visitor"):
        walk(model, names, DATA, Refuses(), progress=False)
    with pytest.raises(RuntimeError, match="shape"):
        walk(model, names, DATA, Fails(), progress=False)
    assert not waiting_passes()
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == forwards


def test_an_interrupt_leaves_no_pass_and_no_forward_behind(monkeypatch):
    """Ctrl-C while the moments are added up, with the exception kept as an interactive session keeps it."""
    model = tiny_model()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "addmm_", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            walk(model, names, DATA, Recorder(), progress=False)
    assert kept.value is not None
    assert not waiting_passes()
    assert torch.isfinite(model(IDS).logits).all()


def test_an_interrupt_while_a_pass_runs_ends_it():
    class Interrupting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.n_calls = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.n_calls += 1
            if Pass.current() is not None and self.n_calls == 4:
                _thread.interrupt_main()
                time.sleep(0.2)
            return self.inner(x)

    model = tiny_model()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    model.model.layers[0].mlp.act_fn = Interrupting(model.model.layers[0].mlp.act_fn)
    # A shell that starts tests in the background has interrupts ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            walk(model, names, DATA, Recorder(), progress=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not waiting_passes()


def test_passes_wait_on_a_cpu_only():
    block, calls = nn.Linear(2, 2), [None] * 100
    assert layer_passes.LayerPasses(block, calls).n_waiting == 100
    assert layer_passes.LayerPasses(block.to("meta"), calls).n_waiting == 0


class Widening(nn.Module):
    """Holds a tensor of its own at the second layer, and a larger one at the third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 10), nn.Linear(10, 90), nn.Linear(90, 10)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.first(x)
        wide = self.second(entered)
        return x + self.third(wide)


@pytest.mark.parametrize(
    ("waiting_bytes", "n_waiting"),
    [(0, [20, 1, 0]), (39_999, [20, 9, 1]), (40_000, [20, 10, 1]), (80_000, [20, 20, 2]), (1 << 20, [20, 20, 20])],
)
def test_so_many_passes_wait_as_their_bytes_allow(waiting_bytes, n_waiting, monkeypatch):
    """A pass holds nothing but its input at the first layer, 4,000 bytes at the second, and 40,000 at the third.

    The first one waits until it has been seen what it holds.
    """
    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    block, found = Widening(), []
    batches = torch.randn(20, 100, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), layer_passes.LayerPasses(block, [Call((x,), {}) for x in batches]) as passes:
        for name in ("first", "second", "third"):
            inputs = [each.x for each in passes.inputs([name])]
            found.append(len(passes.waiting))
            expected = block.first(batches) if name == "second" else batches
            expected = block.second(block.first(batches)) if name == "third" else expected
            torch.testing.assert_close(torch.stack(inputs), expected)
        torch.testing.assert_close(torch.stack(list(passes.outputs())), block(batches))
    assert found == n_waiting
    assert not waiting_passes()


def test_longer_calls_take_more_of_the_room(monkeypatch):
    monkeypatch.setattr(layer_passes, "WAITING_BYTES", 40_000)
    block, lengths = Widening(), [100, 300, 300, 300, 100]  # 4,000 bytes and 12,000 each
    calls = [Call((torch.randn(length, 10),), {}) for length in lengths]
    with torch.no_grad(), layer_passes.LayerPasses(block, calls) as passes:
        assert [len(each.x) for each in passes.inputs(["first"])] == lengths
        assert [len(each.x) for each in passes.inputs(["second"])] == lengths
        assert list(passes.waiting) == [0, 1, 2, 3]


class Regions(nn.Module):
    """Runs each of its layers under settings of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.layers
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = second(first(x))  # the cast of a weight that needs a gradient is kept by autocast
        with torch.enable_grad():
            x = third(x.float())
            assert x.requires_grad
            with torch.no_grad():
                x = x + fourth(x)
        with torch.inference_mode():
            x = fifth(x)
        assert x.is_inference()
        return x


@pytest.mark.parametrize("waiting_bytes", [0, 30_000, 1 << 29])
def test_settings_that_a_block_makes_are_its_own_while_it_waits(waiting_bytes, monkeypatch):
    class Halve(Recorder):
        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            super().visit(name, statistics)
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            model.get_submodule(name).weight.mul_(0.5)

    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    model, batches = Regions(), [torch.randn(20, 8) for _ in range(3)]
    names = [f"layers.{index}" for index in range(5)]
    data = Calibration(data=batches, damping=1e-6, shrinkage=0.0)
    halve = Halve(data)
    monkeypatch.setattr(block_source, "find_block_lists", lambda model, names: [])  # the layers are no blocks
    walk(model, names, data, halve, progress=False)
    for name, x in inputs_by_layer(model, names, torch.cat(batches)).items():
        x = x.float()
        torch.testing.assert_close(halve.hessians[name], x.t() @ x / 60, rtol=1e-3, atol=1e-4)


def test_autocast_changes_nothing():
    model, recorder, plain = tiny_model(), Recorder(), Recorder()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk(model, names, DATA, recorder, progress=False)
    walk(model, names, DATA, plain, progress=False)
    for name in names:
        assert torch.equal(recorder.hessians[name], plain.hessians[name])


def test_targets_are_the_outputs_of_the_model_as_it_was():
    class Zero(Recorder):
        needs_targets = True
        targets: list[Tensor] = []

        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            model.get_submodule(name).weight.data.zero_()

        def finish_block(self, block: str, names: list[str], work: BlockWork) -> None:
            self.targets = work.targets

    model = tiny_model()
    with torch.no_grad():
        expected = model.model(IDS, output_hidden_states=True).last_hidden_state
    zero = Zero()
    walk(model, list(quantizable_modules(model, HQQConfig(group_size=16))), DATA, zero, progress=False)
    torch.testing.assert_close(model.model.norm(torch.cat(zero.targets)), expected)


def test_a_model_without_blocks_is_one_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    batches = [torch.randn(20, 16), torch.randn(30, 16)]
    recorder = Recorder()
    walk(model, ["0", "2"], Calibration(data=batches, damping=1e-6, shrinkage=0.0), recorder, progress=False)
    x = torch.cat(batches)
    torch.testing.assert_close(recorder.hessians["0"], x.t() @ x / 50, rtol=1e-4, atol=1e-5)
    hidden = model[1](model[0](x)).detach()
    torch.testing.assert_close(recorder.hessians["2"], hidden.t() @ hidden / 50, rtol=1e-4, atol=1e-5)


def test_a_layer_that_no_data_reaches_is_visited_without_a_hessian(caplog):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    recorder = Recorder()
    walk(Half(), ["used", "unused"], Calibration(data=[torch.randn(9, 4)]), recorder, progress=False)
    assert recorder.hessians["used"] is not None
    assert recorder.hessians["unused"] is None
    assert "unused" in caplog.text


def test_damping_is_added_to_the_diagonal_and_the_rest_shrinks():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(50, 4)
    data = Calibration(data=[x], damping=0.5, shrinkage=0.25)
    recorder = Recorder(data)
    walk(model, ["0"], data, recorder, progress=False)
    moment = x.t() @ x / 50
    expected = 0.75 * moment + torch.diag(0.25 * moment.diagonal() + 0.5 * moment.diagonal().mean())
    torch.testing.assert_close(recorder.hessians["0"], expected)


def test_inputs_that_are_all_zero_are_no_data(caplog):
    recorder = Recorder()
    walk(nn.Sequential(nn.Linear(4, 4)), ["0"], Calibration(data=[torch.zeros(9, 4)]), recorder, progress=False)
    assert recorder.hessians["0"] is None
    assert "zeros" in caplog.text


def test_a_model_that_overflows_is_refused_before_anything_is_visited():
    model, recorder = tiny_model(), Recorder()
    model.model.layers[0].mlp.down_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1 hold NaN or Inf"):
        walk(model, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], DATA, recorder, progress=False)
    assert not recorder.hessians


def test_weights_of_linear_and_conv1d_come_out_in_x_out_order():
    assert linear_of(tiny_model("gpt2"), "transformer.h.0.attn.c_attn")[0].shape == (192, 64)
    assert linear_of(tiny_model(), "model.layers.0.mlp.up_proj")[0].shape == (96, 64)


def test_layers_that_read_the_same_input_are_given_together():
    class Groups(Recorder):
        groups: list[InputGroup] = []

        def visit_group(self, group: InputGroup) -> None:
            self.groups.append(group)
            super().visit_group(group)

    model, groups = tiny_model(), Groups()
    names = list(quantizable_modules(model, HQQConfig(group_size=16, quantize_lm_head=True)))
    walk(model, names, DATA, groups, progress=False)
    assert [(group.block, group.names) for group in groups.groups[:4]] == [
        ("model.layers.0", tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")),
        ("model.layers.0", ("model.layers.0.self_attn.o_proj",)),
        ("model.layers.0", ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")),
        ("model.layers.0", ("model.layers.0.mlp.down_proj",)),
    ]
    assert (groups.groups[-1].block, groups.groups[-1].names) == ("", ("lm_head",))
    assert groups.groups[0].statistics.n_tokens == 160
    assert list(groups.hessians) == [name for group in groups.groups for name in group.names]


def test_a_visitor_gets_just_the_statistics_that_it_asks_for():
    class Largest(Recorder):
        statistics = ("max_abs",)

        def visit(self, name: str, statistics: InputStatistics | None) -> None:
            assert statistics.second_moment is None
            self.hessians[name] = statistics.max_abs

    model, largest = tiny_model(), Largest()
    names = list(quantizable_modules(model, HQQConfig(group_size=16)))
    walk(model, names, DATA, largest, progress=False)
    for name, x in inputs_by_layer(model, names, IDS).items():
        torch.testing.assert_close(largest.hessians[name], x.abs().amax(0))


def test_an_unknown_statistic_is_refused_before_anything_is_visited():
    class Median(Recorder):
        statistics = ("median",)

    with pytest.raises(ValueError, match="'median' is not a statistic"):
        walk(tiny_model(), ["model.layers.0.mlp.up_proj"], DATA, Median(), progress=False)
