"""A slot that is no task's, given to a public function: on a GPU it ends the process's use of the device.

python -m support.slots_out_of_range task_masked_linear cuda
"""

from __future__ import annotations

import sys

import torch
from support.strides import PUBLIC, SIZES, Make

OPS = [name for name in PUBLIC if "slots" in PUBLIC[name](Make(SIZES["whole"], torch.float32))[1]]


def call(op, slot, device):
    make = Make(SIZES["whole"], torch.float32, device=device)
    run, arguments = PUBLIC[op](make)
    arguments["slots"][2] = slot
    run(**arguments)
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    call(sys.argv[1], int(sys.argv[2]), sys.argv[3])
