"""``peft-quantlayers`` in CPU processes that accelerate takes for those of accelerators: it shards only there."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from peft_quantlayers.cli import main

_original = PartialState.__init__


def _init(self: PartialState, *args: object, **kwargs: object) -> None:
    _original(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_MLU  # a kind that asks nothing of torch


if __name__ == "__main__":
    PartialState.__init__ = _init
    sys.exit(main(sys.argv[1:]))
