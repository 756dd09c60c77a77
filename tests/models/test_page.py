"""docs/guide/models.md holds the table that the models give, with a row for each model that is tested."""

from __future__ import annotations

from support.model_zoo import ZOO
from support.models_page import PAGE, page


def test_page_is_that_of_the_models():
    assert PAGE.read_text() == page(), "run `make models-page`"
    assert all(f"| {entry.name}" in PAGE.read_text() for entry in ZOO)
