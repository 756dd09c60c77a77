"""Two processes of Lightning's ddp under torchrun: ``lightning_ddp.py FOLDER STRATEGY``; rank 0 saves its model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from metamask_ext.integrations.lightning import MetamaskCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.lightning_models import Automatic, data, trainer


def _own_loader() -> DataLoader:
    """Every second sample, in their order: Lightning's own sampler shuffles."""
    rank = int(os.environ["RANK"])
    return DataLoader(TensorDataset(*(part[rank::2] for part in data())), batch_size=2)


def main(folder: str, strategy: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Automatic()
    callback = MetamaskCallback(["a", "b"], every="step", temperature=(1.0, 0.5))
    try:
        fitted = trainer(folder, strategy=strategy, devices=2, max_epochs=3, callbacks=[callback], use_distributed_sampler=False)
        fitted.fit(module, _own_loader())
    except RuntimeError as error:
        Path(folder, f"error-{torch.distributed.get_rank()}").write_text(str(error))
        return
    Path(folder, f"temperature-{torch.distributed.get_rank()}").write_text(str(module.net[0].temperature))
    torch.save(module.net.state_dict(), Path(folder, f"rank-{torch.distributed.get_rank()}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
