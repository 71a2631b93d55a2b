"""Every LoRA feature of PEFT on every method: the numbers of the same feature on the dequantized dense model."""

import copy

import peft
import pytest
import torch
from every_method import METHODS
from integrations.tiny import token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
    create_arrow_model,
    preprocess_loraga,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch._dynamo.testing import CompileCounterWithBackend

from lora.surfaces import (
    adapted,
    assert_requantized,
    assert_same_adapters,
    assert_same_gradient,
    dense_twin,
    lora_layers,
    quantized,
)
from peft_quantlayers import LoraQuantizedLinear, QuantizedLinear

BOTH = ["first", "second"]

# Fields of a LoraConfig for each feature; made for every model, since PEFT writes into configs.
FEATURES = {
    "vanilla": lambda: {},
    "rslora": lambda: {"use_rslora": True},
    "dora": lambda: {"use_dora": True},
    "velora": lambda: {"velora_config": VeloraConfig(num_groups=4, init_type="random")},
    "velora, average": lambda: {"velora_config": VeloraConfig(num_groups=4, init_type="batch_average")},
    "kasa": lambda: {"kasa_config": KasaConfig()},
    "monteclora": lambda: {"monteclora_config": MontecloraConfig(num_samples=2)},
    "bdlora": lambda: {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["second"], target_modules_bd_b=["first"], nblocks=2)
    },
    "lora_bias": lambda: {"lora_bias": True},
    "bias=lora_only": lambda: {"bias": "lora_only"},
    "rank_pattern": lambda: {"rank_pattern": {"first": 2}},
    "alpha_pattern": lambda: {"alpha_pattern": {"first": 32}},
    "dropout": lambda: {"lora_dropout": 0.3},
    "gaussian": lambda: {"init_lora_weights": "gaussian"},
    "orthogonal": lambda: {"init_lora_weights": "orthogonal"},
    "mica": lambda: {"init_lora_weights": "mica"},
    "pissa": lambda: {"init_lora_weights": "pissa"},
    "pissa_niter": lambda: {"init_lora_weights": "pissa_niter_4"},
    "olora": lambda: {"init_lora_weights": "olora"},
}
MOVES_WEIGHT = {"pissa", "pissa_niter", "olora", "kasa"}


def config_of(feature: str):
    def make() -> LoraConfig:
        fields = {"r": 4, "lora_alpha": 8, "target_modules": BOTH, "init_lora_weights": False} | FEATURES[feature]()
        return LoraConfig(**fields)

    return make


@pytest.fixture(params=METHODS)
def method(request, toy_method) -> str:
    return request.param


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def pair(method: str, make_config, kind: str = "two") -> tuple[PeftModel, PeftModel]:
    """The feature on the quantized model and on its dense twin."""
    return adapted(quantized(method, kind), make_config), adapted(dense_twin(method, kind), make_config)


def on_equal_weights(ours: PeftModel, reference: PeftModel) -> None:
    """Give the twin the requantized weights, so that what follows compares the feature and not the rounding."""
    for name, layer in lora_layers(reference).items():
        layer.get_base_layer().weight.data = lora_layers(ours)[name].get_base_layer().dequantize(torch.float32)


@pytest.mark.parametrize("feature", FEATURES)
def test_outputs_gradients_and_merge_are_those_of_the_dense_model(feature, method, x):
    ours, reference = pair(method, config_of(feature))
    assert all(type(layer) is LoraQuantizedLinear for layer in lora_layers(ours).values())
    assert_same_adapters(ours, reference)
    if feature in MOVES_WEIGHT:
        assert_requantized(ours, reference)
        on_equal_weights(ours, reference)

    for model in (ours, reference):
        torch.manual_seed(3)
        model(x).square().sum().backward()
    expected = dict(reference.named_parameters())
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in reference.named_parameters() if parameter.requires_grad]
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same_gradient(parameter.grad, expected[name].grad)

    ours.eval()
    reference.eval()
    output = ours(x)
    torch.testing.assert_close(output, reference(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        before = {name: layer.get_base_layer().quantized_weight for name, layer in lora_layers(ours).items()}
        ours.merge_adapter()
        reference.merge_adapter()
        assert_requantized(ours, reference)
        ours.unmerge_adapter()
    for name, layer in lora_layers(ours).items():
        for tensor_name, tensor in before[name].tensors.items():
            assert torch.equal(layer.get_base_layer().quantized_weight.tensors[tensor_name], tensor)
    assert torch.equal(ours(x), output)


CAUSAL_FEATURES = {
    "alora": lambda: {"alora_invocation_tokens": token_ids()[0, 4:6].tolist(), "task_type": "CAUSAL_LM"},
    "layers_to_transform": lambda: {"layers_to_transform": [1]},
    "layer_replication": lambda: {"layer_replication": [[0, 2], [0, 2]]},
    "exclude_modules": lambda: {"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]},
    "modules_to_save": lambda: {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": lambda: {"trainable_token_indices": [3, 5]},
    "embeddings and head": lambda: {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("feature", CAUSAL_FEATURES)
def test_features_of_whole_models_are_those_of_the_dense_model(feature, method):
    def make() -> LoraConfig:
        fields = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        return LoraConfig(**fields | CAUSAL_FEATURES[feature]())

    ours, reference = pair(method, make, "llama")
    wrapped = [name for name, layer in lora_layers(ours).items()]
    assert wrapped == [name for name, layer in lora_layers(reference).items()]
    ids = token_ids()
    labels = ids.clone()
    outputs = [model(input_ids=ids, labels=labels) for model in (ours, reference)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same_gradient(found[name], gradient)
    assert ours.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()


def test_tied_weights_stay_tied_with_an_adapter_on_them(method):
    def make() -> LoraConfig:
        return LoraConfig(
            r=4,
            target_modules=["q_proj", "embed_tokens", "lm_head"],
            init_lora_weights=False,
            ensure_weight_tying=True,
        )

    ours, reference = pair(method, make, "llama-tied")
    ids = token_ids()
    torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    body = ours.base_model.model
    embeddings, head = body.model.embed_tokens, body.lm_head
    assert embeddings.lora_embedding_A["default"].data_ptr() == head.lora_B["default"].weight.data_ptr() or (
        torch.equal(embeddings.lora_embedding_B["default"], head.lora_B["default"].weight)
    )


def test_eva_starts_from_the_activations_of_the_quantized_model(method, x):
    def make() -> LoraConfig:
        return LoraConfig(r=4, target_modules=BOTH, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))

    batches = [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]

    def forward(model, batch):
        return model(batch)

    ours, reference = pair(method, make)
    for model in (ours, reference):
        torch.manual_seed(4)
        peft.initialize_lora_eva_weights(
            model, copy.deepcopy(batches), forward_fn=forward, prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
    for name, layer in lora_layers(ours).items():
        A, expected = layer.lora_A["default"].weight, lora_layers(reference)[name].lora_A["default"].weight
        cosine = (A * expected).sum(1).abs() / (A.norm(dim=1) * expected.norm(dim=1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_corda_requantizes_the_residual(method, corda_method):
    def make() -> LoraConfig:
        return LoraConfig(
            r=4, target_modules=BOTH, init_lora_weights="corda", corda_config=CordaConfig(corda_method=corda_method)
        )

    models = quantized(method), dense_twin(method)
    batch = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    for model in models:
        preprocess_corda(model, make(), run_model=lambda model=model: model(batch), hooked_model=model)
    ours, reference = (adapted(model, make) for model in models)
    for name, layer in lora_layers(ours).items():
        product, expected = (
            candidate.lora_B["default"].weight @ candidate.lora_A["default"].weight
            for candidate in (layer, lora_layers(reference)[name])
        )
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-4)
    assert_requantized(ours, reference)


def test_arrow_routes_between_experts_as_on_the_dense_model(method, tmp_path):
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(
            dense_twin(method, "llama"),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        model.save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    ids = token_ids()
    outputs = []
    for base in (quantized(method, "llama"), dense_twin(method, "llama")):
        torch.manual_seed(8)  # prototypes come from a random power iteration
        model = create_arrow_model(base, task_specific_adapter_paths=folders, arrow_config=ArrowConfig(top_k=1))
        outputs.append(model.eval()(ids))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0].logits, quantized(method, "llama")(ids).logits, atol=1e-2)


def test_arrow_without_its_experts_is_refused(method):
    with pytest.raises(ValueError, match=r"first: .*there are no experts\. Use .*create_arrow_model"):
        get_peft_model(quantized(method), LoraConfig(r=2, target_modules=BOTH, arrow_config=ArrowConfig()))
    model = adapted(quantized(method), lambda: LoraConfig(r=2, target_modules=["first"]))
    routing = ArrowConfig(top_k=1)
    routing.task_adapter_names = ["default"]
    with pytest.raises(ValueError, match=r"second: .*the experts \['default'\] are not on this layer"):
        model.add_adapter("router", LoraConfig(r=2, target_modules=BOTH, arrow_config=routing))


COMBINATIONS = (
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapters_combine_as_on_the_dense_model(combination, method, x):
    ours, reference = pair(method, config_of("vanilla"))
    for model in (ours, reference):
        torch.manual_seed(6)
        model.add_adapter("other", config_of("vanilla")())
        density = {"density": 0.5} if combination not in ("linear", "cat", "svd") else {}
        torch.manual_seed(7)
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=combination, **density)
        model.set_adapter("sum")
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-3, atol=1e-3)
    if combination in ("linear", "svd"):  # then the deltas are what was asked for
        assert not torch.allclose(ours(x), quantized(method)(x), atol=1e-2)


def test_several_active_adapters_add_up(method, x):
    ours, reference = pair(method, config_of("vanilla"))
    for model in (ours, reference):
        torch.manual_seed(6)
        model.add_adapter("other", config_of("rslora")())
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-4)


def test_generation_with_an_adapter_for_each_row_gives_each_rows_own_text(method):
    model = adapted(
        quantized(method, "llama"),
        lambda: LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    ).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    ids = token_ids()[:1].repeat(3, 1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(ids, adapter_names=["default", "other", "__base__"], **settings)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model.generate(ids[:1], **settings)[0])
    with model.disable_adapter():
        alone.append(model.generate(ids[:1], **settings)[0])
    for row, expected in zip(mixed, alone, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()
    assert len({tuple(row.tolist()) for row in alone}) > 1


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_adapters_of_other_ranks_hotswap_without_compiling_again(method, backend, tmp_path, x):
    outputs = {}
    for rank, alpha in ((2, 8), (3, 5), (4, 16)):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=BOTH, init_lora_weights=False)
        model = get_peft_model(quantized(method), config).eval()
        outputs[rank] = model(x)
        model.save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(quantized(method), tmp_path / "2").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend) if backend else None
    run = torch.compile(model, backend=counter, fullgraph=True) if counter else model
    for number, rank in enumerate((2, 4, 3, 2)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            if number:
                hotswap_adapter(model, tmp_path / str(rank), adapter_name="default")
            torch.testing.assert_close(run(x), outputs[rank])
    assert counter is None or counter.frame_count == 1


def test_swapping_adapters_without_preparing_for_it_compiles_again(method, tmp_path, x):
    """What the test above would see, were it so there."""
    for rank in (2, 4):
        config = LoraConfig(r=rank, target_modules=BOTH, init_lora_weights=False)
        get_peft_model(quantized(method), config).save_pretrained(tmp_path / str(rank))
    model = PeftModel.from_pretrained(quantized(method), tmp_path / "2").eval()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    run(x)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "4", adapter_name="default")
    run(x)
    assert counter.frame_count == 2


def test_an_adapter_loads_with_low_cpu_mem_usage(method, tmp_path, x):
    model = adapted(quantized(method), config_of("vanilla"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapters_have_the_dtype_that_autocast_adapter_dtype_says(method, autocast, expected, x):
    model = get_peft_model(
        quantized(method).to(torch.bfloat16), config_of("vanilla")(), autocast_adapter_dtype=autocast
    )
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    assert torch.isfinite(model(x.bfloat16())).all()


def test_status_names_the_backend_and_parameters_are_counted_as_weights(method, tmp_path):
    ours, reference = pair(method, config_of("vanilla"))
    assert {layer.quantization_backend for layer in ours.get_layer_status()} == {f"quantlayers-{method}"}
    status, expected = ours.get_model_status(), reference.get_model_status()
    assert (status.trainable_params, status.total_params) == (expected.trainable_params, expected.total_params)
    assert status.merged_adapters == []
    ours.save_pretrained(tmp_path)
    assert "peft" in (tmp_path / "README.md").read_text()


def test_a_quantized_layer_in_modules_to_save_is_refused_by_name(method):
    with pytest.raises(NotImplementedError, match=r"second: .*modules_to_save.*skip_modules"):
        get_peft_model(quantized(method), LoraConfig(target_modules=["first"], modules_to_save=["second"]))


def lora_ga(targets: list[str], **fields) -> LoraConfig:
    settings = LoraGAConfig(**fields)
    return LoraConfig(r=4, target_modules=targets, init_lora_weights="lora_ga", lora_ga_config=settings)


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale"])
def test_lora_ga_starts_from_the_gradients_of_the_dense_weights(method, direction, scale):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))  # so that the gradients have full rank

    def make() -> LoraConfig:
        return lora_ga(BOTH, direction=direction, scale=scale)

    models = [quantized(method).eval(), dense_twin(method).eval()]
    for model in models:

        def train_step(model=model) -> None:
            for batch in (x, 2 * x):
                model(batch).square().sum().backward()

        preprocess_loraga(model, make(), train_step)
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trained[0] == {"first.bias", "second.bias"} == trained[1] - {"first.weight", "second.weight"}
    for name in BOTH:
        found, expected = (model.get_submodule(name)._peft_loraga_grad for model in models)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert (found - expected).norm() < 1e-5 * expected.norm()
        # Singular vectors of values that are close to each other are far more sensitive than that.
        models[1].get_submodule(name)._peft_loraga_grad = found
    ours, reference = (adapted(model, make) for model in models)
    assert_same_adapters(ours, reference)
    assert_requantized(ours, reference)


@pytest.mark.parametrize("is_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_ga_sees_the_gradients_of_a_checkpointed_model_with_dense_layers_too(
    method, family, is_reentrant, tmp_path
):
    targets = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "mlp.c_proj"]}[family]
    models = [quantized(method, family), dense_twin(method, family)]
    for number, model in enumerate(models):
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        model.enable_input_require_grads()

        def train_step(model=model) -> None:
            torch.manual_seed(9)  # of dropout
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()

        preprocess_loraga(model, lora_ga(targets), train_step, cache_file=str(tmp_path / str(number)))
    compared = 0
    for name, layer in models[1].named_modules():
        expected = getattr(layer, "_peft_loraga_grad", None)
        if expected is not None:
            found = models[0].get_submodule(name)
            is_turned = isinstance(found, QuantizedLinear) and found.is_conv1d
            found = found._peft_loraga_grad.t() if is_turned else found._peft_loraga_grad
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == {"llama": 5, "gpt2": 4}[family]
    cached = quantized(method, family)
    preprocess_loraga(cached, lora_ga(targets), lambda: None, cache_file=str(tmp_path / "0"))
    adapted(cached, lambda: lora_ga(targets))


def test_lora_ga_names_layers_that_no_gradient_reached(method, x, caplog):
    model = quantized(method)
    preprocess_loraga(model, lora_ga(BOTH), lambda: model.second(torch.relu(model.first(x)).detach()).sum().backward())
    assert "no gradient reached 1 of 2 layers, for example first" in caplog.text
    adapted(model, lambda: lora_ga(BOTH))


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({"use_qalora": True, "qalora_group_size": 24}, "plain LoRA|Set qalora_group_size"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "initialize_loftq"),
        ({"use_dora": True, "velora_config": VeloraConfig(num_groups=4)}, "unsupported variant combination"),
    ],
    ids=["qalora", "loftq", "two variants"],
)
def test_what_is_refused_says_the_way_out(fields, way_out, method):
    if "loftq_config" in fields:
        pytest.importorskip("scipy", reason="PEFT itself refuses LoftQ without scipy")
    with pytest.raises((NotImplementedError, ValueError), match=way_out):
        get_peft_model(quantized(method), LoraConfig(r=4, target_modules=BOTH, **fields))
