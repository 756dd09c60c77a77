"""Runs the blocks of docs/guide/distributed.md, in the processes that are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from support.paths import ROOT

import metamask_ext as mm

PAGE = "docs/guide/distributed.md"


def run(rank, with_lightning):
    """The number of blocks that ran, and the tasks of the last model."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / PAGE).read_text(), re.MULTILINE | re.DOTALL)
    ours = [block for block in blocks if with_lightning or "lightning" not in block]
    names: dict = {}
    for number, block in enumerate(ours, 1):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    return len(ours), mm.tasks(names["model"])


def run_under_torchrun():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "support.guide_blocks"]
    ran = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0 and ran.stdout.count("7 blocks") == 2, ran.stderr


if __name__ == "__main__":
    print(f"{run(0, True)[0]} blocks", flush=True)
