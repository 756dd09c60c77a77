"""A sample of the ops' fuzzer: ``python tests/faults/fuzz_ops.py`` runs more cases, and names the case that fails."""

from __future__ import annotations

import pytest
from support.fuzz import run_case

SEED, PARTS, CASES = 1, 8, 75


@pytest.mark.parametrize("part", range(PARTS))
def test_a_case_is_right_or_refused(part):
    findings = [(index, run_case(SEED, index).fault) for index in range(part * CASES, (part + 1) * CASES)]
    assert not [one for one in findings if one[1]], "\n".join(f"case {index}: {fault}" for index, fault in findings if fault)
