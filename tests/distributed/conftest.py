"""The two processes of the tests of this folder."""

from __future__ import annotations

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.once)
