"""Prints the requirements of an extra in pyproject.toml, for an environment that does not install the package itself.

python tools/extra.py docs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> None:
    name = sys.argv[1]
    # Python 3.10 has no tomllib, and the line is one that this project writes.
    found = re.search(rf"^{re.escape(name)} = \[([^\]]*(?:\[[^\]]*\][^\]]*)*)\]$", PYPROJECT.read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"pyproject.toml has no extra {name!r}")
    print(*re.findall(r'"([^"]+)"', found[1]))


if __name__ == "__main__":
    main()
