"""``python -m metamask_ext``: the command ``metamask``."""

from .cli import main

main()
