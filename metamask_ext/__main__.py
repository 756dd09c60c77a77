"""``python -m metamask_ext``: the command ``metamask``."""

from .cli.app import main

main()
