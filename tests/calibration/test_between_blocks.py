"""What a model does between its blocks reaches the next block: statistics are those of a plain forward pass."""

import pytest
import torch
from _tiny_models import tiny_model
from integrations.tiny import SIZES
from torch import Tensor, nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from peft_quantlayers import Calibration, HQQConfig, QuantizedLinear, quantize_model
from peft_quantlayers.calibration import BlockWork, InputStatistics, Visitor, layer_passes, walk

WIDTH = 16


class Block(nn.Module):
    """Two layers and a residual; takes and gives what the models below need."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is not None:
            x = x + added
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, WIDTH)


class Scaled(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * 3
        return self.head(x)


class Embedded(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(len(self.blocks), WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for block, position in zip(self.blocks, self.positions, strict=True):
            x = block(x + position)
        return self.head(x)


class TwoStreams(Blocks):
    """Each block reads one stream, and gets what the other one holds by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x, x.flip(-1)
        for block in self.blocks:
            left, right = right, block(left, added=right.tanh())
        return self.head(left + right)


class PerBlockInputs(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        inputs = torch.stack([x.roll(shift, -1) for shift in range(len(self.blocks))])
        for index, block in enumerate(self.blocks):
            x = block(x, inputs[index] * x.mean())
        return self.head(x)


class Backwards(Blocks):
    """Runs its blocks in another order than that of the list."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x) / 2
        return self.head(x)


class WithoutGradients(Blocks):
    """Sets torch's settings around its blocks and between them."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            for block in self.blocks:
                x = block(x) * 2
        with torch.enable_grad():
            return self.head(x.clone())


class InBfloat16(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = block(x)
            x = x.float() * 1.5
        return self.head(x)


TOYS = [Scaled, Embedded, TwoStreams, PerBlockInputs, Backwards, WithoutGradients, InBfloat16]
BATCHES = [torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
DATA = Calibration(data=BATCHES)

PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}
TINY = {**SIZES, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "gemma3n": lambda: Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **{**TINY, **PER_LAYER, "intermediate_size": [96] * 4},
            laurel_rank=8,
            altup_num_inputs=2,
            num_kv_shared_layers=2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ),
    "gemma4": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(**TINY, **PER_LAYER, num_kv_shared_layers=2, global_head_dim=16)
    ),
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=128, hidden_size=64, num_hidden_layers=4, intermediate_size=96, rescale_every=1)
    ),
}
IDS = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(0))
TEXT = Calibration(data=IDS, n_tokens=160, sequence_length=40, batch_size=2)


def moments_of_a_plain_pass(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].detach().float().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: x.t() @ x / len(x) for name, x in inputs.items()}


class Recorder(Visitor):
    statistics = ("second_moment",)

    def __init__(self, model: nn.Module, factor: float = 1.0) -> None:
        self.model, self.factor = model, factor
        self.moments: dict[str, Tensor] = {}

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        self.moments[name] = statistics.second_moment
        if self.factor != 1:
            self.model.get_submodule(name).weight.mul_(self.factor)


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("waiting_bytes", [0, 30_000, 1 << 29])
@pytest.mark.parametrize("factor", [1.0, 0.5], ids=["unchanged", "changed"])
@pytest.mark.parametrize("toy", TOYS)
def test_a_block_reads_what_the_model_made_of_the_last_ones_output(toy, factor, waiting_bytes, monkeypatch):
    """With every layer changed after it was visited, as the layers before it are by then."""
    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    model = toy().eval()
    recorder = Recorder(model, factor)
    walk(model, layers_of(model), DATA, recorder, progress=False)
    expected = moments_of_a_plain_pass(model, layers_of(model), BATCHES)
    for name, moment in recorder.moments.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-5)
    assert recorder.moments.keys() == expected.keys()


def test_the_sizes_of_a_scaled_models_inputs_are_the_true_ones():
    model = Scaled().eval()
    recorder = Recorder(model)
    walk(model, layers_of(model), DATA, recorder, progress=False)
    sizes = [float(recorder.moments[f"blocks.{index}.up"].diagonal().mean().sqrt()) for index in range(3)]
    assert sizes[1] > 2.5 * sizes[0]
    assert sizes[2] > 2.5 * sizes[1]


@pytest.mark.parametrize("family", MODELS)
def test_models_of_transformers_that_work_between_their_blocks(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for parameter in model.parameters():
        if not parameter.any():  # a scale that starts as zero
            parameter.data.fill_(1.0)
    # Layers before the blocks are visited after them; a layer that runs twice in a block shows its first input.
    names = [name for name in layers_of(model) if any(f".{part}." in name for part in ("layers", "blocks"))]
    names = [name for name in names if ".altup." not in name]
    recorder = Recorder(model, 0.5)
    walk(model, names, TEXT, recorder, progress=False)
    expected = moments_of_a_plain_pass(model, names, list(IDS.split(2)))
    for name, moment in recorder.moments.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-3, atol=1e-5)


def test_targets_are_the_outputs_of_the_unchanged_models_blocks():
    model = Scaled().eval()
    outputs: dict[int, list[Tensor]] = {index: [] for index in range(3)}
    handles = [
        block.register_forward_hook(lambda _, args, output, index=index: outputs[index].append(output))
        for index, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for handle in handles:
        handle.remove()
    targets = {}

    class Targets(Recorder):
        needs_targets = True

        def finish_block(self, block: str, names: list[str], work: BlockWork) -> bool:
            targets[int(block.split(".")[-1])] = torch.cat(work.targets)
            return False

    walk(model, layers_of(model), DATA, Targets(model, 0.5), progress=False)
    for index, expected in outputs.items():
        torch.testing.assert_close(targets[index], torch.cat(expected))


def test_blocks_that_a_model_runs_in_inference_mode_can_be_finetuned():
    model = WithoutGradients().eval()
    with torch.no_grad():
        expected = [model(batch) for batch in BATCHES]
    errors = []
    for n_epochs in (0, 20):
        options = {"learning_rate": 0.01, "asymmetric_targets": False}
        data = Calibration(data=BATCHES, finetune_epochs=n_epochs, **options)
        model = quantize_model(WithoutGradients().eval(), HQQConfig(nbits=3, group_size=8), calibration=data)
        with torch.no_grad():
            errors.append(sum((model(x) - y).square().sum() for x, y in zip(BATCHES, expected, strict=True)))
    assert errors[1] < errors[0]


def test_hooks_on_a_block_act_once():
    model = Blocks()
    model.forward = lambda x: model.head(model.blocks[2](model.blocks[1](model.blocks[0](x))))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        block.register_forward_hook(lambda _, args, output: output * 2)
    recorder = Recorder(model)
    walk(model, layers_of(model), DATA, recorder, progress=False)
    for name, moment in moments_of_a_plain_pass(model, layers_of(model), BATCHES).items():
        torch.testing.assert_close(recorder.moments[name], moment)


def test_a_pass_that_takes_another_way_once_layers_were_changed_is_an_error():
    class Depends(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            for block in self.blocks[1:] if self.blocks[0].up.weight.sum() == total else reversed(self.blocks[1:]):
                x = block(x)
            return self.head(x)

    model = Depends().eval()
    total = model.blocks[0].up.weight.sum()
    with pytest.raises(ValueError, match=r"came to blocks\.2 where it came to blocks\.1"):
        walk(model, layers_of(model), DATA, Recorder(model, 0.5), progress=False)
    assert all("forward" not in vars(module) for module in model.modules())


class Twice(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


class Skips(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[2](self.blocks[0](x)))


def test_a_block_that_never_runs_is_quantized_without_calibration_and_named(caplog):
    results = []
    model = quantize_model(
        Skips().eval(), HQQConfig(group_size=8), calibration=DATA, progress=False, on_layer=results.append
    )
    assert isinstance(model.blocks[1].up, QuantizedLinear)
    assert {result.name for result in results if result.output_error is None} == {"blocks.1.up", "blocks.1.down"}
    [warning] = [record.getMessage() for record in caplog.records if "without calibration" in record.getMessage()]
    assert "2 of 7 layers" in warning
    assert "skip_modules=['blocks.1']" in warning


class Shared(Blocks):
    """Runs a list of blocks inside those of another one, as some models share an attention block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for block in [*self.inner, *self.inner]:
            x = block(x)
        return self.head(x)


def test_blocks_of_a_smaller_list_that_run_twice_are_visited_in_the_whole_model():
    model = Shared().eval()
    recorder = Recorder(model)
    walk(model, layers_of(model), DATA, recorder, progress=False)
    expected = moments_of_a_plain_pass(model, layers_of(model), BATCHES)
    for name in ("blocks.0.up", "blocks.2.down", "head"):
        torch.testing.assert_close(recorder.moments[name], expected[name], rtol=1e-4, atol=1e-5)
    assert recorder.moments.keys() == expected.keys()


def test_what_the_refusal_of_a_loop_says_is_the_way_out():
    class BothLoop(Shared):
        def forward(self, x: Tensor) -> Tensor:
            for block in [*self.blocks, *self.inner, *self.blocks, *self.inner]:
                x = block(x)
            return self.head(x)

    with pytest.raises(ValueError, match="several times") as refused:
        quantize_model(BothLoop().eval(), HQQConfig(group_size=8), calibration=DATA, progress=False)
    assert "skip_modules=['blocks', 'inner']" in str(refused.value)
    config = HQQConfig(group_size=8, skip_modules=["blocks", "inner"])
    model = quantize_model(BothLoop().eval(), config, calibration=DATA, progress=False)
    assert isinstance(model.head, QuantizedLinear)


def test_a_model_that_is_all_loops_is_not_told_to_skip_everything():
    model = tiny_model("HrmTextForCausalLM")
    ids = torch.randint(3, 200, (8, 40), generator=torch.Generator().manual_seed(0))
    config, data = HQQConfig(group_size=32, iters=1), Calibration(data=ids, n_tokens=320, sequence_length=40)
    with pytest.raises(
        ValueError, match=r"several times\. Quantize the model without calibration\. Nothing"
    ) as refused:
        quantize_model(model, config, calibration=data, progress=False)
    assert "skip_modules" not in str(refused.value)
    quantize_model(model, config, progress=False)


class Reorders(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks if x.sum() < 7 else reversed(self.blocks):
            x = block(x)
        return self.head(x)


class InPlace(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].forward = lambda x: x.add_(self.blocks[1].up(x))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("toy", "message"),
    [
        (Twice, r"blocks\.0.*exactly once"),
        (Reorders, r"order"),
        (InPlace, r"blocks\.1.*changes its inputs in place"),
    ],
)
def test_a_model_whose_blocks_cannot_be_walked_is_refused_with_the_block(toy, message):
    model = toy().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message + r"[\s\S]*Nothing was changed"):
        quantize_model(model, HQQConfig(group_size=8), calibration=DATA, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
