"""Opens the bank in a folder, runs a first batch, and prints the seconds and MB of each. bank.py starts it in a new process."""

import gc
import sys
import time
from pathlib import Path

import torch


def resident() -> float:
    """Returns the MB of this process in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e6


def main(folder: str, outputs: int) -> None:
    before = resident()
    from metamask_ext.bench.mixed_task import lenet

    from metamask_ext import MaskBank, using_task

    batch = torch.load(Path(folder, "batch.pt"))
    model = lenet(outputs)

    begin = time.perf_counter()
    bank = MaskBank.load(folder, model)
    opened = time.perf_counter()
    with torch.no_grad(), using_task(model, batch["names"]):
        y = model(batch["x"])
    done = time.perf_counter()
    torch.testing.assert_close(y.double(), batch["expected"], rtol=1e-4, atol=1e-4)
    after_batch = resident() - before

    names = bank.tasks
    with torch.no_grad():
        for first in range(0, len(names), len(y)):
            some = names[first : first + len(y)]
            with using_task(model, some):
                model(batch["x"][: len(some)])
    gc.collect()
    print(f"open, s:{opened - begin}")
    print(f"first batch, s:{done - opened}")
    print(f"resident after it, MB:{after_batch}")
    print(f"resident after a batch of every task, MB:{resident() - before}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
