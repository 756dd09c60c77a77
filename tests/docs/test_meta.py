"""The code of docs/guide/meta.md runs, in order."""

from __future__ import annotations

import re

import torch
from support.paths import ROOT


def test_code_of_the_page():
    text = (ROOT / "docs/guide/meta.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block.replace("range(100)", "range(2)"), names)
    assert names["prediction"].shape == (25, 10, 1) and not names["prediction"].requires_grad
    assert names["alpha"].grad.abs() > 0
    # The loop of the last block gives what all tasks give at once.
    maml, x, y = names["maml"], names["x"], names["y"]
    maml.zero_grad()
    exec(blocks[3], names)
    looped = [parameter.grad for parameter in maml.parameters()]
    maml.zero_grad()
    maml.inner_steps = 2
    maml(torch.nn.functional.mse_loss, (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])).backward()
    torch.testing.assert_close([parameter.grad for parameter in maml.parameters()], looped, rtol=1e-4, atol=1e-5)
