"""Power failures during a bank's save: every state that the disk may hold opens as the old bank or the new one, whole.

The changes of a save are logged. For each prefix of the log a disk is built: what was synced is there; of what was not, a file's
bytes may be lost, torn, zeros or there, and of a folder's entries none, the first ones or any.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults.bank_save import SCENARIOS, Scenario
from support.faults import Attempt, logged, main

from metamask_ext.bank import BankError

TRIALS = 12
"""Disks for each prefix of a log."""


@dataclass(frozen=True)
class Change:
    """A line of the log, with its paths relative to the folder."""

    what: str
    path: str
    other: str
    offset: int
    data: bytes


def read_log(log: Path, root: Path) -> list[Change]:
    data, at, changes = log.read_bytes(), 0, []
    while at < len(data):
        end = data.index(b"\n", at)
        what, path, other, offset, size = data[at:end].decode().split("\t")
        at = end + 1 + int(size)
        paths = [os.path.relpath(each, root) if each else "" for each in (path, other)]
        changes.append(Change(what, *paths, int(offset), data[end + 1 : at]))
    return changes


Entry = tuple[str, int | None]
"""A folder's entry: a path, and its file's number; None: the path is gone."""


@dataclass
class Disk:
    """Files by number, names in folders, and how much of both is synced."""

    now: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    synced_names: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    synced_folders: set[str] = field(default_factory=set)
    pending: list[tuple[str, list[Entry]]] = field(default_factory=list)
    """Changes of a folder's entries that it has not synced; a rename is one change of two entries."""

    @classmethod
    def of(cls, root: Path) -> Disk:
        """A folder as it is, all of it synced."""
        disk = cls()
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            if path.is_dir():
                disk.folders.add(name)
            else:
                disk._new(name, path.read_bytes())
        disk.synced, disk.synced_names, disk.synced_folders = dict(disk.now), dict(disk.names), set(disk.folders)
        return disk

    def _new(self, name: str, data: bytes) -> None:
        self.names[name] = len(self.now)
        self.now[len(self.now)] = data

    def _entries(self, name: str, *entries: Entry) -> None:
        self.pending.append((os.path.dirname(name) or ".", list(entries)))

    def apply(self, change: Change) -> None:
        what, name = change.what, change.path
        if what == "create":
            self._new(name, b"")
            self._entries(name, (name, self.names[name]))
        elif what == "truncate":
            self.now[self.names[name]] = self.now[self.names[name]][: change.offset]
        elif what == "write":
            if name in self.names:  # not the unnamed ones
                before, start = self.now[self.names[name]], change.offset
                self.now[self.names[name]] = before[:start] + change.data + before[start + len(change.data) :]
        elif what == "fsync":
            self._sync(name)
        elif what == "rename":
            number = self.names.pop(name)
            self.names[change.other] = number
            self._entries(change.other, (change.other, number), (name, None))
        elif what == "link":
            self.names[change.other] = self.names[name]
            self._entries(change.other, (change.other, self.names[name]))
        elif what == "unlink":
            self.names.pop(name, None)
            self.folders.discard(name)
            self._entries(name, (name, None))
        else:
            assert what == "mkdir", what
            self.folders.add(name)
            self._entries(name, (name, -1))

    def _sync(self, name: str) -> None:
        if name in self.names:
            self.synced[self.names[name]] = self.now[self.names[name]]
            return
        for folder, entries in list(self.pending):
            if folder == name:
                _put(self.synced_names, self.synced_folders, entries)
                self.pending.remove((folder, entries))

    def write(self, root: Path, chance: random.Random) -> None:
        """Make ``root`` one of the states that the disk may hold."""
        names, folders = dict(self.synced_names), set(self.synced_folders)
        for entries in self._kept(chance):
            _put(names, folders, entries)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name in sorted(folders):
            if all(parent in folders for parent in _parents(name)):
                (root / name).mkdir()
        for name, number in names.items():
            if all(parent in folders for parent in _parents(name)):
                (root / name).write_bytes(self._bytes(number, chance))

    def _kept(self, chance: random.Random) -> Sequence[list[Entry]]:
        changes = [entries for _, entries in self.pending]
        kinds = (
            lambda: changes,
            lambda: changes[: chance.randint(0, len(changes))],
            lambda: [change for change in changes if chance.random() < 0.5],
            list,
        )
        return chance.choices(kinds, [25, 25, 40, 10])[0]()

    def _bytes(self, number: int, chance: random.Random) -> bytes:
        now, synced = self.now[number], self.synced.get(number)
        if now == synced:
            return now
        return chance.choices([b"", now[: len(now) // 2], bytes(len(now)), now, synced or b""], [30, 20, 20, 15, 15])[0]


def _put(names: dict[str, int], folders: set[str], entries: Sequence[Entry]) -> None:
    for name, number in entries:
        if number is None:
            names.pop(name, None)
            folders.discard(name)
        elif number < 0:
            folders.add(name)
        else:
            names[name] = number


def _parents(name: str) -> list[str]:
    return [str(parent) for parent in Path(name).parents if str(parent) != "."]


class _Attempts:
    """The disks of one scenario."""

    def __init__(self, root: Path, scenario: Scenario):
        self.root, self.folder, self.scenario = root, root / "bank", scenario
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        scenario.before(self.folder)
        self.old = scenario.read(self.folder) if self.folder.exists() else None
        self.before = Disk.of(root)
        log = root.with_suffix(".log")
        with logged(root, log):
            scenario.act(self.folder)
        self.new = scenario.read(self.folder)
        self.changes = read_log(log, root)
        assert any(change.what == "fsync" for change in self.changes)

    def disk(self, length: int, seed: int) -> str | None:
        """Lose power after ``length`` changes."""
        chance = random.Random(f"{length} {seed}")
        disk = Disk(
            dict(self.before.now),
            dict(self.before.synced),
            dict(self.before.names),
            dict(self.before.synced_names),
            set(self.before.folders),
            set(self.before.synced_folders),
        )
        for change in self.changes[:length]:
            disk.apply(change)
        disk.write(self.root, chance)
        try:
            now = self.scenario.read(self.folder)
        except BankError as error:
            if self.old is not None:
                return f"the bank is lost: {error}"
            now = None
        if length == len(self.changes) and now != self.new:
            return "the save had returned, and the disk holds another bank"
        if now not in (self.old, self.new):
            return "the disk holds neither the old nor the new bank"
        try:
            if now is not None or self.old is None:
                self.scenario.act(self.folder)
        except Exception as error:
            return f"the next save raises {error!r}"
        return None if self.scenario.read(self.folder) == self.new else "the next save is wrong"


def attempts(root: Path) -> list[tuple[str, Attempt]]:
    found: list[tuple[str, Attempt]] = []
    for name, scenario in SCENARIOS.items():
        tried = _Attempts(root / "disk", scenario)
        lengths = range(len(tried.changes) + 1)
        found += [(f"{name}, change {at}, disk {k}", partial(tried.disk, at, k)) for at in lengths for k in range(TRIALS)]
    return found


if __name__ == "__main__":
    main(attempts)
