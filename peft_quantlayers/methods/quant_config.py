"""Configs that users pass to quantize a model: one method, with overrides by module name."""

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

from ..arguments import check_choice, check_fields, check_keywords_only
from ..formats.checkpoint import QUANT_METHOD
from ..formats.quant_spec import QuantSpec, dtype_name


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches a pattern: a shell pattern for the whole name, or for its last parts.

    ``"down_proj"`` matches every module whose last part is that, ``"layers.0.*"`` everything below any ``layers.0``.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


# The first config class that was made for a spec.
_config_types: dict[type[QuantSpec], type["QuantConfig"]] = {}


# Arguments of quantize_model that readers look for in a config.
OF_QUANTIZE_MODEL = {"calibration", "tokenizer", "budget", "transforms", "device"}


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which modules of a model are quantized, with overrides by name. Mixed into each method's spec.

    A method's config combines this class and its spec: ``make_config(MySpec)``, or a class of two lines. The fields
    of both are validated when the config is made.

    Fields:
        compute_dtype: dtype that the layers compute in; None for the model's.
        skip_modules: name patterns of modules to leave as they are, in addition to the output head.
        overrides: for each name pattern the fields that differ there; a later pattern overrides an earlier one.
        quantize_lm_head: quantize the output head too, unless it shares its weight with the embeddings.
        quantize_embeddings: bits, 8 or 4, of the input embeddings and of the output head, which hold one copy if they
            share their weight; None to leave them dense. They are stored as HQQ weights in groups of 64 whatever the
            method, without calibration, and ``overrides`` do not reach them. A head of its own is left to
            ``quantize_lm_head`` where that is set.
        on_misfit: what to do with a module whose shape the spec does not fit, for example where ``group_size`` does
            not divide its inputs. ``"shrink"``: take the largest smaller groups that fit, or leave it dense where the
            method has none; ``"dense"``: leave it dense; ``"refuse"``: an error, and nothing is quantized.
    """

    spec_type: ClassVar[type[QuantSpec]]
    quant_method: ClassVar[str] = QUANT_METHOD

    compute_dtype: str | None = None
    skip_modules: tuple[str, ...] | None = None
    overrides: dict[str, dict[str, Any]] | None = None
    quantize_lm_head: bool = False
    quantize_embeddings: int | None = None
    on_misfit: Literal["shrink", "dense", "refuse"] = "shrink"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "spec_type" in vars(cls):
            _config_types.setdefault(cls.spec_type, cls)

    def __new__(cls, *positional: Any, **fields: Any) -> Self:
        """Raise TypeError for an unknown field, and list the known ones."""
        check_keywords_only(cls.__name__, positional, f"{cls.__name__}(compute_dtype=...)")
        if of_call := sorted(fields.keys() & OF_QUANTIZE_MODEL):
            raise TypeError(
                f"{cls.__name__} has no field {of_call}: how a model is quantized with data is said where it is, "
                f"quantize_model(model, {cls.__name__}(...), {of_call[0]}=...)."
            )
        check_fields(cls.__name__, fields, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the spec's: this class is mixed into one
        if self.compute_dtype is not None:
            object.__setattr__(self, "compute_dtype", dtype_name("compute_dtype", self.compute_dtype))
        check_choice("quantize_lm_head", self.quantize_lm_head, (False, True))
        check_choice("quantize_embeddings", self.quantize_embeddings, (None, 8, 4))
        check_choice("on_misfit", self.on_misfit, ("shrink", "dense", "refuse"))
        if self.skip_modules is not None:
            if isinstance(self.skip_modules, str) or not all(isinstance(p, str) for p in self.skip_modules):
                raise TypeError(f"skip_modules must be a list of name patterns, got {self.skip_modules!r}.")
            object.__setattr__(self, "skip_modules", tuple(self.skip_modules))
        if self.overrides is not None:
            if not isinstance(self.overrides, dict):
                raise TypeError(f"overrides must map name patterns to fields, got {self.overrides!r}.")
            for pattern, fields in self.overrides.items():
                if not isinstance(pattern, str) or not isinstance(fields, dict):
                    raise TypeError(f"overrides must map name patterns to fields, got {pattern!r}: {fields!r}.")
                try:
                    self._spec_with(fields)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"overrides[{pattern!r}]: {error}") from None

    def spec_for(self, module_name: str) -> QuantSpec:
        """The spec of one module, overrides applied."""
        fields: dict[str, Any] = {}
        for pattern, changed in (self.overrides or {}).items():
            if matches(module_name, pattern):
                fields |= changed
        return self._spec_with(fields)

    def fitted_spec(self, spec: QuantSpec, out_features: int, in_features: int) -> QuantSpec | None:
        """The spec of a module of this shape, for which :meth:`spec_for` has ``spec``; None to leave it dense.

        Raises:
            ValueError: the shape does not fit, with ``on_misfit="refuse"``.
        """
        if self.on_misfit == "refuse":
            spec.tensor_layout(out_features, in_features)
        if self.on_misfit == "shrink":
            return spec.fitted(out_features, in_features)
        return None if spec.misfit(out_features, in_features) else spec

    def is_skipped(self, module_name: str) -> bool:
        """Whether ``skip_modules`` matches this module, or one that contains it."""
        parts = module_name.split(".")
        names = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(matches(name, pattern) for pattern in self.skip_modules or () for name in names)

    def _spec_with(self, changed: dict[str, Any]) -> QuantSpec:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self.spec_type)}
        return self.spec_type.from_dict(own | changed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields under transformers' key ``quant_method``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.skip_modules is not None:
            fields["skip_modules"] = list(self.skip_modules)
        return {"quant_method": self.quant_method, "method": self.spec_type.method, **fields}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The config that :meth:`to_dict` wrote; raises as a spec's ``from_dict`` does."""
        return super().from_dict({name: value for name, value in fields.items() if name != "quant_method"})  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`; transformers calls it to print a config."""
        return self.to_dict()


def check_config(name: str, config: Any) -> None:
    """Raise TypeError unless ``config`` is one; says how to make one of a class or a mapping."""
    if isinstance(config, type) and issubclass(config, QuantConfig):
        raise TypeError(f"{name} must be a config, got the class {config.__name__}: write {config.__name__}().")
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"{name} must be an HQQConfig or another QuantConfig, got {type(config).__name__}. From a mapping of "
            "fields: HQQConfig(**fields)."
        )


def make_config(spec_type: type[QuantSpec]) -> type[QuantConfig]:
    """The config class of a method, named after ``spec_type``.

    Assign it under that name in the module of the spec, ``MyConfig = make_config(MySpec)``, so that it can be pickled.
    """
    name = spec_type.__name__.removesuffix("Spec") + "Config"
    doc = (
        f"Quantize a model with {spec_type.method}. Fields: those of :class:`{spec_type.__name__}` and of "
        ":class:`QuantConfig`."
    )
    contents = {"__doc__": doc, "__module__": spec_type.__module__, "spec_type": spec_type}
    return dataclass(frozen=True, kw_only=True)(type(name, (QuantConfig, spec_type), contents))


def config_type(spec_type: type[QuantSpec]) -> type[QuantConfig]:
    """The config class of a method with this spec; made here if the method defines none."""
    return _config_types.get(spec_type) or make_config(spec_type)
