"""Compares the speed of two checkouts on a suite of ``metamask bench``: ``compare_checkouts.py OLD NEW --suite cpu``.

Two versions of one extension cannot live in one process, and the same code in two processes may differ by a third, by where
their memory came to lie. So each round starts a fresh process of each checkout, in turns first and second; the two take turns
on every case, and a case's ratio is the median over the rounds of the medians of its turns. ``OLD`` given twice shows the noise.
Both checkouts are built in place (``python setup.py build_ext --inplace``) and keep ``bench`` at their top.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

WORKER = r"""
import json, sys, time
sys.path.insert(0, sys.argv[1])
import metamask_ext
assert metamask_ext.__file__.startswith(sys.argv[1] + "/"), metamask_ext.__file__
from bench.cases import SUITES
suite = SUITES[sys.argv[2]]
cases = {case.id: case for case in (suite() if callable(suite) else suite)}
print(json.dumps(list(cases)), flush=True)
name = None
for line in sys.stdin:
    wanted, calls = json.loads(line)
    if wanted != name:
        work = None
        contenders = cases[wanted].build().contenders
        work, name = next(contenders[key].work for key in ("metamask", "ours") if key in contenders), wanted
    start = time.perf_counter()
    for _ in range(calls):
        work()
    print(json.dumps((time.perf_counter() - start) / calls), flush=True)
"""
TURN_SECONDS = 0.03


class Worker:
    """A process of one checkout, which times calls when asked."""

    def __init__(self, checkout: Path, suite: str):
        command = [sys.executable, "-c", WORKER, str(checkout.resolve()), suite]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        self.cases: list[str] = self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, case: str, calls: int) -> float:
        """Returns the mean seconds a call."""
        self.process.stdin.write(json.dumps([case, calls]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def turns(old: Worker, new: Worker, case: str, seconds: float) -> float:
    """Returns the median of new / old over turns that take about ``seconds`` in all."""
    first = max(worker.seconds(case, 2) for worker in (old, new) for _ in range(2))
    calls = max(1, round(TURN_SECONDS / first))
    ratios: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < 4:
        order = (old, new) if len(ratios) % 2 else (new, old)
        took = {worker: worker.seconds(case, calls) for worker in order}
        ratios.append(took[new] / took[old])
    return statistics.median(ratios)


def compare(checkouts: tuple[Path, Path], suite: str, rounds: int, seconds: float, only: str) -> Iterable[dict[str, float]]:
    """Yields, a round, each case's ratio."""
    for round in range(rounds):
        order = (0, 1) if round % 2 else (1, 0)
        workers = {index: Worker(checkouts[index], suite) for index in order}
        shared = [case for case in workers[1].cases if case in workers[0].cases and only in case]
        yield {case: turns(workers[0], workers[1], case, seconds) for case in shared}
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--suite", default="cpu")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of processes")
    parser.add_argument("--seconds", type=float, default=0.8, help="a case and round")
    args = parser.parse_args()
    table: dict[str, list[float]] = {}
    for ratios in compare((args.old, args.new), args.suite, args.rounds, args.seconds, args.only):
        for case, ratio in ratios.items():
            table.setdefault(case, []).append(ratio)
        print(f"round {len(next(iter(table.values())))} of {args.rounds}", file=sys.stderr, flush=True)
    medians = {case: statistics.median(ratios) for case, ratios in table.items()}
    print(f"{'case':44s} new/old   lowest  highest of {args.rounds} rounds")
    for case, median in medians.items():
        print(f"{case:44s} {median:7.3f}  {min(table[case]):7.3f}  {max(table[case]):7.3f}")
    mean = math.exp(statistics.fmean(map(math.log, medians.values())))
    print(f"{'geometric mean':44s} {mean:7.3f}   median {statistics.median(medians.values()):.3f}")


if __name__ == "__main__":
    main()
