"""Every row of docs/guide/distributed.md in the processes that torchrun has started: `make test-distributed`."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
from support import rows_ddp, rows_parallel, rows_sharded


def _rows(world, folder):
    found = [*rows_ddp.ROWS, *rows_sharded.ROWS, *rows_parallel.ROWS]
    if world == 4:
        found += [*rows_sharded.OF_FOUR, *rows_parallel.OF_FOUR]
    return found + [(*row, os.path.join(folder, str(number))) for number, row in enumerate(rows_parallel.IN_A_FOLDER)]


def main():
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    rows = _rows(world, shared[0])
    failed = 0
    for function, *arguments in rows:
        try:
            function(rank, *arguments)
        except Exception:
            failed += 1
            print(f"rank {rank} of {world}: {function.__module__}.{function.__name__}{tuple(arguments)}", file=sys.stderr)
            traceback.print_exc()
            break  # the other ranks may wait within the row
    if not failed:
        dist.barrier()
    if rank == 0:
        print(f"{len(rows)} rows on {world} ranks: {'one failed' if failed else 'all passed'}")
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
