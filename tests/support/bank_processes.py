"""Processes that save and read one bank at once, and are killed: a program of one thread, which bank/test_faults.py runs.

Every generation of the bank holds its number in every tensor, so that a mixture of two shows.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.banks import files

from metamask_ext.bank import BankError, Store, save
from metamask_ext.bank import writer as writer_module

TASKS = 8
DEADLINE = time.monotonic() + 200


@contextmanager
def at_call(nth: int, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` before the nth call that changes the disk, and before all later ones; a write is half done by then."""
    calls = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= nth:
                act()
            return function(*arguments, **options)

        return call

    whole = writer_module._Writer._write

    def write(writer: Any, path: str, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            whole(writer, path, data[: len(data) // 2])
            act()
        whole(writer, path, data)

    patches = [mock.patch.object(os, name, before(getattr(os, name))) for name in ("mkdir", "fsync", "replace")]
    with patches[0], patches[1], patches[2], mock.patch.object(writer_module._Writer, "_write", write):
        yield


def generation(number: int, shared: int | None = None) -> dict[str, Any]:
    """``meta``, shared weights and tasks of one generation; ``shared``: that of the weights, if they are to stay."""
    tasks = [
        (f"t{slot}", ({"x": torch.full((50,), float(number)), "y": torch.tensor(number)}, {"n": number})) for slot in range(TASKS)
    ]
    weights = number if shared is None else shared
    return {"meta": {"weights": weights}, "shared": {"w": torch.full((9,), float(weights))}, "tasks": tasks}


def whole_generation(folder: Path) -> int:
    """The number of the generation in ``folder``, which must be whole."""
    store = Store.open(folder)
    store.verify()
    number = store.meta["weights"]
    assert store.tasks == ["kept", *(f"t{slot}" for slot in range(TASKS))]
    assert bool((store.shared()["w"] == number).all())
    for name in store.tasks[1:]:
        task = store.task(name)
        assert bool((task["x"] == number).all()) and int(task["y"]) == number and store.entry(name)["n"] == number
    assert bool((store.task("kept")["x"] == 7).all())
    return number


def save_generation(folder: Path, number: int) -> None:
    """One task is referred to from generation to generation."""
    made = generation(number)
    kept = (Store.open(folder), "kept") if (folder / "bank.json").exists() else ({"x": torch.full((9,), 7.0)}, {})
    save(folder, made["meta"], made["shared"], [("kept", kept), *made["tasks"]])


def forked(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_time() -> None:
    """No process is left behind where one waits for another in vain."""
    assert time.monotonic() < DEADLINE, "this takes too long"


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def random_kills(folder: Path) -> dict[str, int]:
    """Fifty savers, killed at random moments."""
    chance = random.Random(0)
    (folder / "tasks").mkdir()
    for path in (folder / "notes.txt", folder / "tasks" / "notes.txt"):
        path.write_text("not ours")
    save_generation(folder, 0)
    last, counts = 0, Counter(debris=0)
    for _ in range(50):
        reading, writing = os.pipe()

        def saver(last: int = last, writing: int = writing) -> None:
            for number in range(last + 1, last + 10_000):
                save_generation(folder, number)
                os.write(writing, b".")

        child = forked(saver)
        os.close(writing)
        assert os.read(reading, 1), "the saver died"
        os.close(reading)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        number = whole_generation(folder)
        assert number > last, "a committed save is not undone"
        counts["debris"] += len(files(folder)) != TASKS + 1 + 2 + 2
        last = number
    save_generation(folder, last + 1)
    assert len(files(folder)) == TASKS + 1 + 2 + 2, "what killed saves left is deleted"
    assert (folder / "notes.txt").read_text() == (folder / "tasks" / "notes.txt").read_text() == "not ours"
    return counts


def aimed_kills(folder: Path) -> dict[str, int]:
    """A saver killed before every one of its calls that change the disk, and amid every write."""
    save_generation(folder, 0)
    last, counts = 0, Counter(old=0, new=0)
    for nth in range(1, 1000):

        def saver(nth: int = nth, last: int = last) -> None:
            with at_call(nth, kill_self):
                save_generation(folder, last + 1)

        code = exit_code(forked(saver))
        number = whole_generation(folder)
        assert number in (last, last + 1)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        counts["new" if number > last else "old"] += 1
        last = number
    return counts


def first_save_killed(folder: Path) -> dict[str, int]:
    """No bank is there before."""
    counts = Counter(none=0, new=0)
    for nth in range(1, 1000):
        target = folder / str(nth)

        def saver(nth: int = nth, target: Path = target) -> None:
            with at_call(nth, kill_self):
                save_generation(target, 1)

        if exit_code(forked(saver)) == 0:
            break
        if (target / "bank.json").exists():
            assert whole_generation(target) == 1
            counts["new"] += 1
        else:
            counts["none"] += 1
        save_generation(target, 2)
        assert whole_generation(target) == 2 and len(files(target)) == TASKS + 1 + 2
    return counts


def size_limit(folder: Path) -> dict[str, int]:
    """The kernel refuses to let a file grow, as on a full disk; every size of limit meets another file first."""
    save_generation(folder, 0)
    before = files(folder)
    sizes = sorted({len(data) for data in before.values()})
    counts = Counter(refused=0)
    for limit in [0, 100, *(size - 1 for size in sizes)]:

        def saver(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: a write fails with EFBIG
            try:
                save_generation(folder, 1)
            except OSError as error:
                assert "File too large" in str(error), error
            else:
                raise AssertionError(f"a limit of {limit} bytes stopped nothing")

        assert exit_code(forked(saver)) == 0
        assert files(folder) == before, "the old files, and no other"
        counts["refused"] += 1
    return counts


def readers(folder: Path) -> dict[str, int]:
    """Three readers, until each has met both kinds of change, while one saves: every second save changes the shared weights."""

    def numbers(index: int) -> dict[str, Any]:
        return generation(index, shared=index - index % 2)

    save(folder, **numbers(0))
    results = [folder.parent / f"reader-{index}.json" for index in range(3)]
    done = folder.parent / "done"

    def reader(result: Path, seed: int) -> None:
        chance, counts = random.Random(seed), Counter(read=0, newer=0, changed=0)
        while counts["read"] < 200 or not counts["newer"] or not counts["changed"]:
            check_time()
            store = Store.open(folder)
            weights = store.meta["weights"]
            try:
                assert bool((store.shared()["w"] == weights).all())
                first = None
                for name in chance.sample(store.tasks, TASKS):
                    time.sleep(chance.uniform(0, 0.003))
                    task = store.task(name)
                    number = int(task["y"])
                    assert bool((task["x"] == number).all()) and store.entry(name)["n"] == number, "a task is of one save"
                    assert number - number % 2 == weights, "a task is of the shared weights"
                    first = number if first is None else first
                    counts["newer"] += number > first
                    counts["read"] += 1
            except BankError as error:
                assert "was changed since it was opened" in str(error), error
                counts["changed"] += 1
        result.write_text(json.dumps(counts))

    def writer() -> None:
        index = 0
        while not done.exists():
            check_time()
            save(folder, **numbers(index := index + 1))
            time.sleep(0.01)

    children = [forked(lambda result=result, seed=seed: reader(result, seed)) for seed, result in enumerate(results)]
    saver = forked(writer)
    codes = [exit_code(child) for child in children]
    done.touch()
    assert [*codes, exit_code(saver)] == [0] * 4, codes
    return sum((Counter(json.loads(result.read_text())) for result in results), Counter())


def writers(folder: Path) -> dict[str, int]:
    """Two processes append to one bank, each trying again when it is refused: no task of either is lost."""
    save(folder, {}, {}, [])

    def appender(letter: str) -> None:
        chance, refused = random.Random(letter), 0
        for number in range(20):
            task = (f"{letter}{number}", ({"x": torch.tensor(number)}, {}))
            while True:
                check_time()
                store = Store.open(folder)
                time.sleep(chance.uniform(0, 0.01))
                try:
                    # The reference is to a task of the state that was read: without one, a save says that it wants just its own.
                    save(folder, {}, {}, [*((name, (store, name)) for name in store.tasks), task])
                    break
                except BankError as error:
                    assert "another process is writing" in str(error) or "was saved again" in str(error), error
                    refused += 1
                    time.sleep(chance.uniform(0, 0.005))
        (folder.parent / f"{letter}.json").write_text(json.dumps({"refused": refused}))

    save(folder, {}, {}, [("first", ({}, {}))])
    children = [forked(lambda letter=letter: appender(letter)) for letter in "ab"]
    assert [exit_code(child) for child in children] == [0, 0]
    store = Store.open(folder)
    assert sorted(store.tasks) == sorted(["first", *(f"{letter}{number}" for letter in "ab" for number in range(20))])
    assert all(int(store.task(name)["x"]) == int(name[1:]) for name in store.tasks if name != "first")
    return sum((Counter(json.loads((folder.parent / f"{letter}.json").read_text())) for letter in "ab"), Counter())


if __name__ == "__main__":
    torch.set_num_threads(1)
    program = {
        function.__name__: function for function in (random_kills, aimed_kills, first_save_killed, size_limit, readers, writers)
    }[sys.argv[1]]
    target = Path(sys.argv[2]) / "bank"
    target.mkdir()
    print(json.dumps(program(target)))
