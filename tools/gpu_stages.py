"""Starts tools/gpu, whatever Python's search path is: see ``python tools/gpu_stages.py --help``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    # Under PYTHONSAFEPATH not even this script's own folder is searched.
    sys.path[:0] = [str(root / "tools"), str(root / "tests")]
    from gpu.command import main

    main()
