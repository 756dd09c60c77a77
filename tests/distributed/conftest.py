"""The two processes of the tests of this folder."""

from __future__ import annotations

import pytest
from support import distributed_models
from support.ranks import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture(params=distributed_models.OPTIMIZERS)
def _each_optimizer(request, ranks):
    """The runs of a test are of each of the fused optimisers in turn."""
    ranks(distributed_models.use, request.param)
    yield
    ranks(distributed_models.use, "SGD")


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.once)
