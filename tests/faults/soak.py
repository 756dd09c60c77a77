"""Random operations on a bank beside a model of it in plain torch, and the memory of repeated calls.

``python -m faults.soak --seconds 600 --calls 5000``, in tests.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from support.soak import BankBesidePlainTorch, growths

MOST_GROWTH = 2.0
"""MiB by which any number of calls may make the process grow."""
STEPS = 40
"""The most operations of an episode."""


def soak(seconds: float, first_seed: int = 0) -> int:
    """Runs episodes until the time is over; returns their number. The first that fails is shrunk and raises."""
    end, episodes = time.monotonic() + seconds, 0
    for number in itertools.count(first_seed):
        examples = 10
        run_state_machine_as_test(
            seed(number)(BankBesidePlainTorch),
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
        episodes += examples
        if time.monotonic() > end:
            break
    return episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    grown = growths(args.calls)
    for name, growth in grown.items():
        print(f"{name}: {growth:+.2f} MiB in {args.calls} calls", flush=True)
    print(f"{soak(args.seconds, args.seed)} episodes of at most {STEPS} operations, no difference", flush=True)
    if max(grown.values()) > MOST_GROWTH:
        raise SystemExit(f"more than {MOST_GROWTH} MiB")


if __name__ == "__main__":
    main()
