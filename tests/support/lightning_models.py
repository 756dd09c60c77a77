"""A small masked model as a LightningModule, and the same training by hand."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metamask_ext as mm

LR = 0.1


def net() -> nn.Module:
    """The same each time, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(mm.nn.MaskedLinear(4, 6), nn.Tanh(), mm.nn.MaskedLinear(6, 2)).double()


def data(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.sum(1), x[:, 0]], 1)


def loader(batch: int = 4, count: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*data(count)), batch_size=batch)


class Automatic(LightningModule):
    """``fails_at``: the number of the training step that raises; ``seen``: the task of each call."""

    def __init__(self, fails_at: int = -1):
        super().__init__()
        self.net, self.fails_at, self.steps = net(), fails_at, 0

    def loss(self, batch) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, number):
        self.steps += 1
        loss = self.loss(batch)
        if self.steps == self.fails_at:
            raise FloatingPointError("the loss is nan")
        return loss

    def validation_step(self, batch, number, dataloader_idx=0):
        self.log(f"of-{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


class Manual(Automatic):
    """Its own backward and step; fused."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        self.optimizers().optimizer.backward(self.loss(batch))

    def configure_optimizers(self):
        return mm.optim.FusedMaskedSGD(self.net, LR)


def trainer(folder, **options) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **options})


def by_hand(tasks: list[str], added: list[str], batch: int = 4, accumulate: int = 1, seed: int = 0) -> nn.Module:
    """The net after a step for each task of ``tasks``, which goes through the batches over and over."""
    model = net()
    torch.manual_seed(seed)
    for task in added:
        mm.add_task(model, task)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    x, y = data()
    for number, task in enumerate(tasks):
        rows = slice(number * batch % len(x), number * batch % len(x) + batch)
        with mm.using_task(model, task):
            (nn.functional.mse_loss(model(x[rows]), y[rows]) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model
