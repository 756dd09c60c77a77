"""Writes the table of docs/guide/models.md: `make models-page`."""

from __future__ import annotations

from support.models_page import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page())
