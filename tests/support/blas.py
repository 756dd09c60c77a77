"""A table by which every product goes through BLAS, and the fixture that puts it in force."""

from __future__ import annotations

import pytest

from metamask_ext import products

_LINES = (products.Line(pass_, dtype, 1, 256, 256, 1) for pass_ in ("forward", "backward") for dtype in products.DTYPES)
ALWAYS = products.Table("always BLAS", tuple(_LINES), task_rows=1)


@pytest.fixture
def through_blas():
    with products.using_table(ALWAYS):
        for pass_ in ("forward", "backward"):
            assert all(products.through_blas(pass_, dtype, 1, 3, 5) for dtype in products.DTYPES.values())
        yield
