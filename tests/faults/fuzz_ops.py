"""Runs cases of the ops' fuzzer: ``python tests/faults/fuzz_ops.py --cases 20000``, or ``--first 17 --cases 1`` for one of them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.fuzz import run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the ops")
    arguments = parser.parse_args()
    begin = time.monotonic()
    counts, findings = run_all(arguments.seed, arguments.first, arguments.cases, arguments.threads)
    for index, fault in findings:
        print(f"case {index}: {fault}")
    total = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{sum(counts.values())} cases in {time.monotonic() - begin:.0f} s: {total}; {len(findings)} findings", flush=True)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
