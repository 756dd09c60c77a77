"""tools/mutate.py knows tests for every kernel file that it takes something out of."""

from __future__ import annotations

from fnmatch import fnmatch

import mutate
import pytest
from support.paths import ROOT


def test_every_kernel_file_has_tests():
    names = {mutant.path.name for mutant in mutate.all_mutants()}
    assert names
    unused = [pattern for pattern in mutate.SMALLEST_TESTS if not any(fnmatch(name, pattern) for name in names)]
    assert not unused, f"no kernel file is called {unused}"


@pytest.mark.parametrize("pattern", mutate.SMALLEST_TESTS)
def test_the_tests_are_there(pattern):
    assert all((ROOT / file).exists() for file in mutate.SMALLEST_TESTS[pattern].files)
