"""The LoRA layer of a quantized stack of experts: PEFT's own for fused parameters, without dense weights.

Names, shapes and files of an adapter are those of PEFT's ``ParamWrapper``, which wraps the experts module, one wrapper
in another for each parameter. What differs is the product: instead of the deltas of all experts, computed in each
forward pass, every expert's tokens go through that expert's two factors. So memory grows with tokens times rank, and
dropout, which PEFT refuses here, works as it does on linear layers.

May import layers, merging, and PEFT's public classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quantlayers_kernels.branch_products import Branch

from ..layers.expert_branches import ExpertBranches, branches_on
from ..layers.stack import QuantizedStack
from ..merging import AdapterTraits, MergePlan
from ..merging.stack_source import StackSource
from ..merging.strategies import STRATEGIES
from .stack_plan import expert_plan, expert_traits


class LoraQuantizedStack(ParamWrapper, StackSource):
    """PEFT's ``ParamWrapper`` on a :class:`QuantizedStack` ``parameter_name`` of an experts module.

    Merging differs as in :class:`LoraQuantizedLinear`: the deltas of all adapters are summed in float32, expert by
    expert, and merged at once by one of the rules in ``merging/merge_rules.py``; ``unmerge`` restores the same bits.

    Attributes:
        merge_strategy: name of the rule that ``merge`` follows; see :func:`set_merge_strategy`.
        merging: what is merged into the stack, and the way back.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        self.merge_strategy = "auto"
        StackSource.__init__(self)
        plain, dropout = _without_dropout(config), config.lora_dropout
        super().__init__(base_layer, adapter_name, parameter_name, plain, r=r, lora_alpha=lora_alpha, **kwargs)
        self._set_dropout(adapter_name, dropout)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's, with dropout; what needs the dense weight, and variants, are refused."""
        stack = self.unmerged_stack()
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "eva"):
            raise NotImplementedError(
                f"{stack.layer_name}: init_lora_weights={config.init_lora_weights!r} needs the dense weights of all "
                'experts, which are quantized. Use True or "gaussian".'
            )
        if config.use_qalora:
            raise NotImplementedError(
                f"{stack.layer_name}: use_qalora is for linear layers. Leave target_parameters out, or use plain LoRA."
            )
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config.lora_dropout)

    def _set_dropout(self, adapter_name: str, probability: float) -> None:
        dropout = nn.Dropout(probability) if probability > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts module's result, with the active adapters on this parameter."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                f"{self.parameter_name}: mixed batches (adapter_names=...) cannot use adapters on experts. "
                "Run one adapter at a time."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.active_here():
            return self.base_layer(x, *args, **kwargs)
        with branches_on(self.stack(), _Branches(self)):
            return self.base_layer(x, *args, **kwargs)

    def stack(self) -> QuantizedStack:
        """The quantized stack under the adapters, as it is now."""
        return cast(QuantizedStack, self.get_param())

    def active_here(self) -> list[str]:
        """Names of the adapters whose products are added: the active ones, and none while something is merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def branches(self, names: Sequence[str]) -> ExpertBranches:
        """The adapters ``names`` as matrices of all experts."""
        branches = []
        for name in names:
            dropout = self.lora_dropout[name]
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            B, A = self.expert_factors(name)
            branches.append(Branch(A.contiguous(), B.contiguous(), self.scaling[name], p))
        return ExpertBranches(branches)

    def expert_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Of one adapter (n_experts, out_features, r) and (n_experts, r, in_features), which give, multiplied and
        scaled, the delta of each expert's weight: views of the matrices in PEFT's layout, differentiable."""
        A, B = cast(nn.Linear, self.lora_A[name]).weight, cast(nn.Linear, self.lora_B[name]).weight
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        # PEFT takes the last side of the parameter for the inputs, unless the module says that it is transposed. Of
        # a class that is and does not say so (Llama 4), its A has the outputs.
        is_said = getattr(self.get_base_layer(), "is_transposed", False)
        return (
            (A.transpose(1, 2), B.transpose(1, 2)) if self.unmerged_stack().is_transposed and not is_said else (B, A)
        )

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the given adapters, together with those merged before, by the rule of ``merge_strategy``.

        Args:
            safe_merge: accepted for PEFT's sake; a merge that would give NaN or Inf is always refused.
            adapter_names: adapters to merge; None for the active ones.

        Raises:
            ValueError: the merged weight is not finite; names the expert, and the stack is left as it was.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        self.refuse_what_others_wrote()
        if self.kind not in STRATEGIES[self.merge_strategy].rules:
            raise ValueError(
                f'{self.unmerged_stack().layer_name}: strategy="{self.merge_strategy}" is for adapters on linear '
                f"layers, and these are on experts. Choose one of {self.possible_strategies()} with "
                "set_merge_strategy. Nothing was merged."
            )
        self.merge_by(self.rule_of(self.merge_strategy), [*self.merged_adapters, *new])

    def unmerge(self) -> None:
        """Put back the stack from before the first merge, bit for bit."""
        self.refuse_what_others_wrote()
        self.undo_merge()

    def traits(self, names: Sequence[str]) -> AdapterTraits:
        return expert_traits(self, [name for name in self.lora_A if name in names])

    def experts_module(self) -> nn.Module:
        return self.get_base_layer()

    def plan(self, names: Sequence[str], part: int = 0) -> MergePlan:
        """As :meth:`MergeSource.plan`, of one expert; adapters are summed in the order in which they were added."""
        ordered = [name for name in self.lora_A if name in names]
        with torch.no_grad():
            return expert_plan(self, part, ordered)


class _Branches:
    """The branches of a layer's experts for one forward pass, made once, and again where the adapters change."""

    def __init__(self, layer: LoraQuantizedStack) -> None:
        self.layer = layer
        self.names: list[str] = []
        self.found: ExpertBranches | None = None

    def __call__(self) -> ExpertBranches | None:
        names = self.layer.active_here()
        if names != self.names:
            self.names, self.found = names, self.layer.branches(names) if names else None
        return self.found


def _without_dropout(config: LoraConfig) -> LoraConfig:
    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain
