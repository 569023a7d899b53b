"""Whether a checkpoint can be a mixture of two states: one rank is killed before it writes its part again.

    python -m campaigns.rank_peers.mixture save|load FOLDER

Two ranks save rows of ones as step 1, then rows of twos as the same step; rank 1 is killed as soon as it is
to write the second time. Then both load. Rank 0 prints ``rows`` and the rows that it got.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = 8


def main(arguments: Sequence[str]) -> int:
    phase, folder = arguments
    (_save if phase == "save" else _load)(Path(folder))
    return 0


def _rows(value: float) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.full((ROWS,), value), mesh, [Shard(0)])


def _save(folder: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"rows": _rows(1.0)}, checkpoint_id=folder)
    original = FileSystemWriter.write_data

    def write(writer: Any, plan: Any, planner: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(writer, plan, planner)

    FileSystemWriter.write_data = write  # type: ignore[method-assign, assignment]
    save({"rows": _rows(2.0)}, checkpoint_id=folder)


def _load(folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_loader import load

    values = {"rows": _rows(0.0)}
    load(values, checkpoint_id=folder)
    rows = values["rows"].full_tensor().tolist()
    if dist.get_rank() == 0:
        print("rows", *map(int, rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
