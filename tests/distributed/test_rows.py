"""The rows of docs/guide/distributed.md on two ranks, in float64, which assert on each; `make test-distributed`: on four, too."""

from __future__ import annotations

import pytest
from support import rows_ddp, rows_parallel, rows_sharded


def _name(row):
    function, *arguments = row
    return ", ".join([function.__name__, *arguments])


@pytest.mark.parametrize("row", rows_ddp.ROWS, ids=_name)
def test_distributed_data_parallel(ranks, row):
    ranks(*row)


@pytest.mark.parametrize("row", rows_sharded.ROWS, ids=_name)
def test_fully_shard(ranks, row):
    ranks(*row)


@pytest.mark.parametrize("row", rows_parallel.ROWS, ids=_name)
def test_tensor_parallel(ranks, row):
    ranks(*row)


@pytest.mark.parametrize("row", rows_parallel.IN_A_FOLDER, ids=_name)
def test_distributed_checkpoints(ranks, row, tmp_path):
    ranks(*row, str(tmp_path))
