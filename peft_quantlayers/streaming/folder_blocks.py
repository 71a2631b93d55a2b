"""A model in files as the calibration walk sees it: one block in memory at a time, and what lies around the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..calibration.block_order import order_of
from ..calibration.block_source import ModelBlocks
from ..calibration.blocks import Call, evaluating
from ..calibration.process_group import ALONE, Processes
from ..integrations.tensor_groups import TensorGroup
from ..layers.dense_stack import as_called_stacks, as_parameters
from ..storage.free_memory import return_free_memory
from .checkpoint_parts import PartsOfModel
from .work_folder import WorkFolder


class FolderBlocks(ModelBlocks):
    """A :class:`~..calibration.block_source.BlockSource` over a float checkpoint and the parts that are finished.

    What lies around the blocks (embeddings, norms, heads) stays in memory, and so do blocks that run but cannot be
    walked one by one. A block is read when it is opened, and dropped when it is left.

    Attributes:
        together: the processes that walk through the model, each over a source of its own. They share its calls
            unless ``shares_calls`` is false, as where all of them are needed in one place.
        finished: the parts that an earlier call has finished.
        needs_originals: whether the visitor runs the float model too, so that finished blocks are read as well.
        unreached: blocks that no data reaches, known after :meth:`check`; the walk does not come to them.
    """

    def __init__(
        self,
        parts: PartsOfModel,
        work: WorkFolder,
        calls: list[Call],
        *,
        together: Processes = ALONE,
        shares_calls: bool = True,
    ) -> None:
        self.parts, self.work, self.together = parts, work, together
        self.needs_originals = False
        super().__init__(
            parts.checkpoint.model,
            list(parts.specs),
            calls,
            device=parts.device,
            processes=together if shares_calls else ALONE,
        )
        # As the first process sees it, which goes on to finish others.
        self.finished = together.of_first(lambda: set(filter(work.is_finished, range(len(parts.parts)))))
        self.unreached: list[str] = []
        self._ran: set[str] = set()
        self._resident: list[str] = []
        self._hooks = ExitStack()

    @contextmanager
    def ready(self) -> Iterator[None]:
        checkpoint, parts = self.parts.checkpoint, self.parts
        checkpoint.prepare_forward()
        checkpoint.load([group for number in parts.around for group in parts.parts[number]])
        checkpoint.tie()
        device = torch.device(self.device or "cpu")
        try:
            for number in set(parts.around) - set(parts.late):
                if number not in self.finished:
                    parts.keep(self.work, number)
            with (
                evaluating(self.model),
                torch.autocast(device.type, enabled=False, cache_enabled=False),
                as_called_stacks(self.model, parts.specs),
            ):
                yield
            if not self.together.is_first:
                return
            parts.quantize_tables()
            for number in [*parts.late, *(parts.number_of[block] for block in self._resident)]:
                parts.keep(self.work, number)
        finally:
            self._hooks.close()
            checkpoint.release()

    def check(self, *, progress: bool = False) -> None:
        """As :meth:`BlockSource.check`, with one call of each kind: each of them reads the whole model."""
        kinds = {tuple(sorted(call.kwargs)): call for call in self.calls}
        all_blocks = list(self.blocks)
        with self._streamed():
            order = order_of(self.model, self.lists, list(kinds.values()), layers=self.names, progress=progress)
        self._resident = [block for block in all_blocks if block in self._ran and block not in order]
        self.unreached = [block for block in all_blocks if block not in self._ran]
        for block in self._resident:
            self._load(block)
        self.set_blocks(order)
        self.rest = [name for name in self.rest if not any(name.startswith(f"{block}.") for block in self.unreached)]

    @contextmanager
    def opened(self, block: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        if self.needs_originals or self.parts.number_of[block] not in self.finished:
            self._load(block)
        try:
            yield module
        finally:
            self.parts.checkpoint.release(module)
            return_free_memory()

    def restore(self, block: str) -> bool:
        """Put the quantized block in the place of the float one, if an earlier call has finished it."""
        number = self.parts.number_of[block]
        if number not in self.finished:
            return False
        record = self.work.record(number)
        self.parts.restore({name: about for name, about in record["layers"].items() if name not in self.parts.layers})
        self._load_finished(block, record)
        return True

    def whole(self) -> tuple[nn.Module, list[Call]]:
        if self.rest:
            self._hooks.enter_context(self._streamed())
            self.together.gathered(lambda: None)  # the first process has kept the last block by then
        return super().whole()

    def _device_of(self, block: str) -> torch.device:
        return torch.device("cpu")

    def _load(self, block: str) -> None:
        """The float block, where it runs."""
        self._load_groups(block, self.parts.parts[self.parts.number_of[block]])
        self.model.get_submodule(block).to(self.device or self.home(block))

    def _load_groups(self, block: str, groups: Sequence[TensorGroup]) -> None:
        with as_parameters(self.model, [name for name in self.parts.specs if name.startswith(f"{block}.")]):
            self.parts.checkpoint.load(groups)

    def _load_finished(self, block: str, record: dict[str, Any]) -> None:
        """The quantized block, whose layers are in their places; what a file holds in another form is read again."""
        number, module = self.parts.number_of[block], self.model.get_submodule(block)
        stored = {
            name.removeprefix(f"{block}."): self.work.read(number, key, record["checksums"][key])
            for name, key in record["names"].items()
        }
        module.load_state_dict(stored, strict=False, assign=True)
        missing = {name for name, tensor in module.state_dict(prefix=f"{block}.").items() if tensor.is_meta}
        groups = [group for group in self.parts.parts[number] if missing & set(group.parameters)]
        self._load_groups(block, groups)
        module.to(self.device or self.home(block))

    @contextmanager
    def _streamed(self) -> Iterator[None]:
        """While this is open the model runs as a whole: each block is read when it is called, and dropped after."""
        with ExitStack() as stack:
            for block in self.parts.number_of:
                if block not in self._resident:
                    module = self.model.get_submodule(block)
                    stack.callback(module.register_forward_pre_hook(self._before(block)).remove)
                    stack.callback(module.register_forward_hook(self._after(block), always_call=True).remove)
            yield

    def _before(self, block: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple) -> None:
            self._ran.add(block)
            if any(name.startswith(f"{block}.") for name in self.parts.layers):
                self._load_finished(block, self.work.record(self.parts.number_of[block]))
            else:
                self._load(block)

        return read

    def _after(self, block: str) -> Callable[..., None]:
        def drop(module: nn.Module, args: tuple, output: Any) -> None:
            self.parts.checkpoint.release(module)
            return_free_memory()

        return drop
