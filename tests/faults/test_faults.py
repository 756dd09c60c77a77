"""A sample of what ``make faults`` tries whole: failing calls of a save and of a training loop, Ctrl-C, and power failures."""

from __future__ import annotations

import random

import pytest
from faults.power_loss import Change, Disk
from support.faults import build_library, run_program


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.mark.once
@pytest.mark.parametrize(("name", "sample"), [("bank_save", 250), ("loop_run", 120), ("power_loss", 250)])
def test_sample(library, name, sample):
    report = run_program(name, library, "--sample", str(sample), timeout=240)
    assert report["tried"] == sample
    assert not report["failures"], "\n".join(report["failures"][:20])


def _disks(tmp_path, synced: bool) -> set[bytes | None]:
    """The contents that a file may have after its replacement and a power failure, with the syncs that make it safe or without."""
    (tmp_path / "file").write_bytes(b"old")
    before = Disk.of(tmp_path)
    changes = [Change("create", "new", "", 0, b""), Change("write", "new", "", 0, b"data"), Change("fsync", "new", "", 0, b"")]
    changes += [Change("rename", "new", "file", 0, b""), Change("fsync", ".", "", 0, b"")]
    for change in changes:
        if synced or change.what != "fsync":
            before.apply(change)
    found = set()
    for seed in range(60):
        before.write(tmp_path / "disk", random.Random(seed))
        file = tmp_path / "disk" / "file"
        found.add(file.read_bytes() if file.exists() else None)
    return found


def test_power_failures_lose_what_was_not_synced_and_nothing_else(tmp_path):
    assert _disks(tmp_path, synced=True) == {b"data"}
    assert _disks(tmp_path, synced=False) == {b"old", b"data", b"da", b"\0\0\0\0", b""}
