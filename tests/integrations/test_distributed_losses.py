"""Two processes that share each batch, by DDP and by FSDP2, have the losses of one process."""

from pathlib import Path

import distributed_losses
import pytest
from processes import WORLD_SIZE, in_processes, needs_gloo, run_file

STEPS = 4


def run(rank: int, folder: str) -> None:
    for method in distributed_losses.CONFIGS:
        saved = Path(folder, method)
        expected = distributed_losses.loss_curve(saved, "one process", STEPS)
        assert expected[-1] < expected[0]
        for way in ("DDP", "FSDP2"):
            found = distributed_losses.loss_curve(saved, way, STEPS, rank=rank, world_size=WORLD_SIZE)
            assert found == pytest.approx(expected, rel=1e-5), (method, way)


@needs_gloo
def test_ddp_and_fsdp2_have_the_losses_of_one_process(tmp_path):
    distributed_losses.save_models(tmp_path)
    run_file(__file__, tmp_path)


if __name__ == "__main__":
    in_processes(run)
