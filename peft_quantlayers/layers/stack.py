"""A stack of quantized weights in place of the fused parameter of a mixture's experts.

The experts module of the architecture stays, with its biases and activations; this is its child, under the
parameter's name. Whatever reads one expert at a time works as before: ``self.gate_up_proj[e]`` is a view that
``F.linear`` and ``@`` multiply with straight from the codes. What wants all experts' dense weights at once is refused.

May import formats, methods and the kernels; never PEFT or transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlayers_kernels.frozen_experts import FrozenExperts, expert_rows, lora_experts
from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears

from ..formats import QuantizedWeight
from ..integrations.private_transformers import mark_as_initialized
from .expert_branches import branches_of
from .expert_view import ExpertView
from .placement import IN_ONE_PROCESS, check_weights_are_here
from .quantize_weight import quantize_weight
from .quantized_storage import QuantizedStorage
from .stack_branch import StackBranch

_WAYS = (
    'model.set_experts_implementation("quantlayers"), the default of a quantized model, and "eager" read one expert '
    "at a time"
)


class QuantizedStack(QuantizedStorage):
    """The weights of all experts, quantized: codes and metadata with the expert as first dimension.

    ``shape``, ``ndim``, ``dtype`` and ``device`` are those of the fused parameter, and ``stack[e]`` is the weight of
    an expert as it lay there; see :class:`ExpertView`. Called as a module, it multiplies sorted tokens.

    Attributes:
        spec: how each weight is stored.
        n_experts, out_features, in_features: of the stack.
        is_transposed: the fused parameter has each weight as (in_features, out_features).
        parameter_order: names of the parameters of the experts module, fused ones included, in their first order.
        compute_dtype, layer_name, n_writes: see :class:`QuantizedStorage`.
        branch: low-rank branches whose results are added, or None; no part of the weights.
    """

    branch: StackBranch | None
    bias: nn.Parameter | None

    def __init__(
        self,
        quantized: QuantizedWeight,
        *,
        compute_dtype: torch.dtype,
        layer_name: str = "experts",
        is_transposed: bool = False,
        parameter_order: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if len(quantized.leading) != 1:
            raise ValueError(f"{layer_name}: a stack has one leading dimension, got {quantized.leading}.")
        self.spec = quantized.spec
        self.leading = quantized.leading
        self.in_features = quantized.in_features
        self.out_features = quantized.out_features
        self.is_transposed = is_transposed
        self.parameter_order = tuple(parameter_order)
        self.compute_dtype = compute_dtype
        self.layer_name = layer_name
        self.register_module("branch", None)
        self._register_tensors(quantized, None)
        mark_as_initialized(self)  # codes always come from a quantizer or a checkpoint

    # ---- the parameter that was here

    @property
    def n_experts(self) -> int:
        """Weights in the stack."""
        return self.leading[0]

    @property
    def shape(self) -> torch.Size:
        """(n_experts, out_features, in_features), or with the last two exchanged: that of the fused parameter."""
        sides = (self.in_features, self.out_features) if self.is_transposed else (self.out_features, self.in_features)
        return torch.Size((self.n_experts, *sides))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """3."""
        return 3

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def numel(self) -> int:
        """Weights of all experts."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weights that reading an expert gives."""
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self.codes.device

    def __len__(self) -> int:
        return self.n_experts

    def __getitem__(self, expert: Any) -> ExpertView:
        """The weight of one expert, as the fused parameter has it.

        Raises:
            IndexError: there is no such expert.
            NotImplementedError: several at once, which would be a dense stack.
        """
        index = self._index(expert)
        return ExpertView(_Expert(self, index))

    def _index(self, expert: Any) -> int:
        is_one = isinstance(expert, int) or (isinstance(expert, Tensor) and expert.dim() == 0)
        if not is_one:
            raise NotImplementedError(
                f"{self.layer_name}: {type(expert).__name__} asks for several experts' dense weights at once, which "
                f"quantized experts do not build. {_WAYS}."
            )
        index = int(expert)
        if not -self.n_experts <= index < self.n_experts:
            raise IndexError(f"{self.layer_name}: expert {index} of {self.n_experts}.")
        return index % self.n_experts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """``bmm`` of (n_experts, n_tokens, in_features) with a transposed stack; anything else is refused."""
        if func in (torch.bmm, Tensor.bmm) and not kwargs and len(args) == 2:
            x, stack = args
            if isinstance(x, Tensor) and isinstance(stack, cls) and stack.is_transposed and len(x) == len(stack):
                return sorted_bmm(x, stack)
        stack = next((each for each in (*args, *(kwargs or {}).values()) if isinstance(each, cls)), None)
        name = "experts" if stack is None else stack.layer_name
        raise NotImplementedError(
            f"{name}: {getattr(func, '__name__', func)} wants the dense weights of all experts, which are quantized. "
            f"{_WAYS}; stack.dequantize() gives the dense stack."
        )

    def transpose(self, *_: Any) -> Any:
        """Refused: implementations that multiply with the whole dense stack begin with it."""
        raise NotImplementedError(
            f"{self.layer_name}: this experts implementation wants the dense weights of all experts, which are "
            f"quantized. {_WAYS}."
        )

    # ---- weights

    def expert_weight(self, expert: int) -> QuantizedWeight:
        """The quantized weight of one expert; its tensors are views of the stack's."""
        return self._weight_of(self._tensors())[expert]

    def dequantize_expert(self, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight of one expert, (out_features, in_features), in ``dtype`` (default: ``compute_dtype``)."""
        return self.method.dequantize(self.expert_weight(expert), dtype=dtype or self.compute_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All dense weights, shaped as the fused parameter, in ``dtype`` (default: ``compute_dtype``)."""
        return self._dense(dtype, has_branch=False)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """:meth:`dequantize` with the branches in it: what a dense parameter needs to compute the same."""
        return self._dense(dtype, has_branch=True)

    def _dense(self, dtype: torch.dtype | None, *, has_branch: bool) -> Tensor:
        dtype = dtype or self.compute_dtype
        dense = torch.empty(self.shape, dtype=dtype, device=self.device)
        with torch.no_grad():
            for expert in range(self.n_experts):
                if self.branch is None or not has_branch:
                    weight = self.dequantize_expert(expert, dtype)
                else:
                    weight = self.dequantize_expert(expert, torch.float32) + self.branch.dense_of(expert)
                dense[expert] = weight.t() if self.is_transposed else weight
        return dense

    def write_expert(self, expert: int, weight: Tensor) -> None:
        """Quantize ``weight`` (out_features, in_features) into the stack; the other experts keep their bits.

        What is there already is not quantized again. Metadata that the spec's dtype cannot hold make those of all
        experts float32.

        Raises:
            ValueError: another shape, NaN or Inf, or this process has not all codes; the stack is as it was.
        """
        check_weights_are_here(self, f"{self.layer_name}: writing a weight", if_sharded=IN_ONE_PROCESS)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"{self.layer_name}: cannot write a weight of shape {tuple(weight.shape)} into experts of shape "
                f"{(self.out_features, self.in_features)}."
            )
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.detach().to(self.device)
            if torch.equal(weight, self.dequantize_expert(expert).to(weight.dtype)):
                return
            quantized = quantize_weight(weight, self.spec, layer_name=f"{self.layer_name}[{expert}]")
            self.quantized_weight = self.quantized_weight.with_entry(expert, quantized)

    def add_branch(self, branch: StackBranch) -> None:
        """Add the results of ``branch`` to the experts' from now on, in place of an earlier branch."""
        self.branch = branch

    def with_weight(self, quantized: QuantizedWeight) -> QuantizedStack:
        """A stack like this one with other weights, which computes as this one does."""
        stack = QuantizedStack(
            quantized,
            compute_dtype=self.compute_dtype,
            layer_name=self.layer_name,
            is_transposed=self.is_transposed,
            parameter_order=self.parameter_order,
        )
        stack.activation_bits = self.activation_bits
        return stack.train(self.training)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, metadata and branches included."""
        branch_bits = 0 if self.branch is None else 8 * self.branch.nbytes
        return self.quantized_weight.bits_per_weight + branch_bits / self.numel()

    # ---- products

    def forward(self, x: Tensor, counts: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """``x @ weight[e].T`` with each token's own expert.

        Differentiable in ``x``, and in the factors of adapters.

        Args:
            x: (n_tokens, in_features), floating: first the tokens of expert 0, then those of expert 1, and so on.
            counts: tokens of each expert.
            tokens: which token of the batch each row of ``x`` is, for who watches the calls; not read here.

        Returns:
            (n_tokens, out_features), dtype of ``x``.

        Raises:
            ValueError: ``x`` has another last dimension or is not floating, or ``counts`` do not add up.
        """
        if len(counts) != self.n_experts or sum(counts) != x.shape[0]:
            raise ValueError(
                f"{self.layer_name}: {x.shape[0]} tokens do not fit the counts of {len(counts)} experts, which add up "
                f"to {sum(counts)}; the stack has {self.n_experts}."
            )
        dtype, output_dtype = self._checked_dtypes(x)
        method, weight, found = self.method, self._weight_of(self._tensors()), branches_of(self)
        if any(tensor.requires_grad for tensor in weight.tensors.values()):  # scales are tuned, or a block is
            parts = [self.expert_product(x[rows], expert) for expert, rows in expert_rows(counts)]
            return torch.cat(parts) if parts else x.new_empty(0, self.out_features, dtype=output_dtype)
        branches = [] if found is None else list(found.of_all)
        if self.branch is not None:
            branches.append(self.branch.of_all())
        experts = FrozenExperts(
            multiply=lambda x: method.experts_linear(x.to(dtype), weight, counts).to(output_dtype),
            input_gradient=lambda grad: method.experts_input_gradient(grad.to(dtype), weight, counts).to(x.dtype),
            counts=counts,
        )
        return lora_experts(x, experts, branches)

    def expert_product(self, x: Tensor, expert: int, bias: Tensor | None = None) -> Tensor:
        """``x @ weight[expert].T + bias``, (..., in_features) to (..., out_features), dtype of ``x``."""
        dtype, output_dtype = self._checked_dtypes(x)
        method, weight, branch = self.method, self.expert_weight(expert), self.branch
        found = branches_of(self)
        branches = [] if found is None else found.of_each[expert]

        def multiply(x: Tensor) -> Tensor:
            return method.linear(x.to(dtype), weight, None).to(output_dtype)

        if branches:
            frozen = FrozenLinear(
                multiply=lambda x: multiply(x).contiguous(),
                tiles=lambda dtype: method.weight_tiles(weight, dtype=dtype),
                dtype=dtype,
                bias=None,
                branches=branches,
            )
            y = lora_linears(x, [frozen])[0]
        else:
            y = multiply(x)
        if branch is not None:
            A, B = branch.A[expert], branch.B[expert]
            y = (y + F.linear(F.linear(x.to(A.dtype), A), B)).to(output_dtype)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self.spec, name)}" for name in self.spec.shown_fields]
        return ", ".join(
            [
                f"n_experts={self.n_experts}",
                f"in_features={self.in_features}",
                f"out_features={self.out_features}",
                f"method={self.spec.method!r}",
                *shown,
            ]
        )


def sorted_bmm(x: Tensor, stack: Any) -> Tensor:
    """``torch.bmm(x, stack)`` of (n_experts, n_tokens, in_features), where each expert sees all tokens, by a call."""
    n_experts, n_tokens = x.shape[:2]
    tokens = torch.arange(n_tokens, device=x.device).repeat(n_experts)
    return stack(x.flatten(0, 1), [n_tokens] * n_experts, tokens).view(n_experts, n_tokens, -1)


class _Expert:
    """One expert of a stack, as the owner of the weight behind an :class:`ExpertView`; its sides are as stored."""

    def __init__(self, stack: QuantizedStack, expert: int) -> None:
        self.stack, self.expert = stack, expert
        self.out_features, self.in_features = stack.shape[1:]
        self.compute_dtype = stack.compute_dtype
        self.layer_name = f"{stack.layer_name}[{expert}]"
        self.is_transposed = stack.is_transposed

    @property
    def n_writes(self) -> int:
        return self.stack.n_writes

    @property
    def codes(self) -> Tensor:
        return self.stack.codes

    def dequantize(self) -> Tensor:
        weight = self.stack.dequantize_expert(self.expert)
        return weight.t() if self.is_transposed else weight

    def write_weight(self, weight: Tensor) -> None:
        self.stack.write_expert(self.expert, weight.t() if self.is_transposed else weight)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.stack.expert_product(x, self.expert, bias)


def parameter_order(experts: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of an experts module, fused ones included, in the order that the class gave them."""
    found = (getattr(child, "parameter_order", ()) for child in experts.children())
    return next(filter(None, found), tuple(experts._parameters))
