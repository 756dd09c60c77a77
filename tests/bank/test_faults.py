"""A bank on disk under damage, kills, full disks and other processes: refused by name, or the old or the new state, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bank_processes import at_call
from support.banks import META, contents, files, logits, new_bank, packed, read_body, shared, write_body
from support.paths import TESTS

from metamask_ext.bank import BankError, BankNotFoundError, Store, save
from metamask_ext.bank import store as store_module
from metamask_ext.bank.index import Index
from metamask_ext.bank.writer import locked_bank


def _load_all(folder: Path) -> dict[str, Any]:
    return contents(Store.open(folder))


def _assert_refused(folder: Path, *texts: str) -> None:
    """By what uses the file, and by verify."""
    for use in (_load_all, lambda folder: Store.open(folder).verify()):
        with pytest.raises(BankError) as error:
            use(folder)
        assert all(text in str(error.value) for text in texts), error.value


def _run(program: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "support.bank_processes", program, str(folder)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def test_1000_flipped_bytes(tmp_path):
    save(tmp_path, META, shared(), [("a", packed(0)), None, ("b", logits(1))])
    whole = files(tmp_path)
    places = [(name, place) for name, data in whole.items() for place in range(len(data))]
    chance = random.Random(0)
    assert len(whole) == 4 and len(places) > 1000
    for name, place in chance.sample(places, 1000):
        damaged = bytearray(whole[name])
        damaged[place] ^= chance.randrange(1, 256)
        (tmp_path / name).write_bytes(damaged)
        _assert_refused(tmp_path, name)
        (tmp_path / name).write_bytes(whole[name])
    assert set(_load_all(tmp_path)) == {"meta", "shared", "tasks"}


def test_truncated_and_grown_files(tmp_path):
    new_bank(tmp_path)
    whole = files(tmp_path)
    for name, data in whole.items():
        for damaged in (*(data[:length] for length in (0, 1, 7, 8, 60, len(data) // 2, len(data) - 1)), data + b"\0", data + b"\n"):
            (tmp_path / name).write_bytes(damaged)
            _assert_refused(tmp_path, name)
        (tmp_path / name).unlink()
        _assert_refused(tmp_path, name)
        (tmp_path / name).write_bytes(data)
    Store.open(tmp_path).verify()


def test_verify_reads_again_what_was_used(tmp_path):
    store = new_bank(tmp_path)
    store.task("a")
    path = tmp_path / store.entry("a")["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BankError, match=f"{path.name}: damaged"):
        store.verify()


def test_swapped_files(tmp_path):
    """Each is whole by itself."""
    store = new_bank(tmp_path)
    one, other = (tmp_path / store.entry(name)["file"] for name in "ab")
    assert one.stat().st_size == other.stat().st_size
    one.write_bytes(other.read_bytes())
    _assert_refused(tmp_path, one.name, "SHA-256")
    assert torch.equal(Store.open(tmp_path).task("b")["bits/fc.weight"], packed(1)[0]["bits/fc.weight"])


def test_another_format(tmp_path):
    new_bank(tmp_path)
    data = (tmp_path / "bank.json").read_bytes()
    (tmp_path / "bank.json").write_bytes(data.replace(b'"metamask_bank": 1', b'"metamask_bank": 2', 1))
    _assert_refused(tmp_path, "bank.json: format 2, this version of metamask_ext reads format 1")
    for other in (
        b"{}",
        b"[]\n",
        b"\x80\x04",
        b'{"metamask_bank": 1}',
        b'{"metamask_bank": 1,\n',
        b'{"metamask_bank": 1,\n"sha256": "',
    ):
        (tmp_path / "bank.json").write_bytes(other)
        _assert_refused(tmp_path, "bank.json: damaged")


def _outside(body: dict[str, Any], file: str) -> None:
    body["tasks"][0]["file"] = file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (lambda body, file=file: _outside(body, file), repr(file))
            for file in ("../x", "/etc/passwd", "tasks/../../x", "x", "", "bank.json")
        ),
        (lambda body: _outside(body, "tasks/../" + body["tasks"][1]["file"]), "names the file 'tasks/../tasks/b-"),
        (lambda body: _outside(body, body["tasks"][1]["file"]), "names the file 'tasks/b-"),
        (lambda body: _outside(body, body["tasks"][0]["file"] + "\n"), "names the file 'tasks/a-"),
        (lambda body: body["shared"].update(file="../" + body["shared"]["file"]), "names the file '../shared-"),
        (lambda body: body["tasks"][0].update(sha256="x"), "64 hexadecimal digits"),
        (lambda body: body["tasks"][0].update(bytes=-1), "must be a size"),
        (lambda body: body["tasks"][0].update(bytes="1"), "must be a size"),
        (lambda body: body["tasks"][0].update(name=""), "must have a name"),
        (lambda body: body["tasks"][0].update(info=[]), "info object"),
        (lambda body: body["tasks"][1].update(name="a"), "two of its tasks have one name"),
        (lambda body: body["tasks"].append("c"), "TypeError"),
        (lambda body: body.pop("shared"), "KeyError: 'shared'"),
        (lambda body: body.update(meta=[]), "meta must be an object"),
        (lambda body: body.update(tasks=3), "TypeError"),
    ],
)
def test_a_forged_index(tmp_path, change, message):
    folder = tmp_path / "bank"
    new_bank(folder)
    body = read_body(folder)
    write_body(folder, body)
    Store.open(folder).verify()
    change(body)
    write_body(folder, body)
    _assert_refused(folder, "bank.json: ", message)


def test_files_that_lie(tmp_path):
    """Checksums that are right over contents that are not those of a bank."""
    store = new_bank(tmp_path)
    body = read_body(tmp_path)
    for data in (b"", b"not a safetensors file at all", (tmp_path / store.entry("a")["file"]).read_bytes()[:-1]):
        sha256 = hashlib.sha256(data).hexdigest()
        file = f"tasks/a-{sha256[:32]}.safetensors"
        (tmp_path / file).write_bytes(data)
        body["tasks"][0].update(file=file, sha256=sha256, bytes=len(data))
        write_body(tmp_path, body)
        _assert_refused(tmp_path, f"{file}: not a safetensors file")
    # A task of another bank's weights
    other = save(tmp_path / "other", META, shared(1), [("b", packed(1))])
    entry = other._index.tasks[0].file
    body["tasks"][0].update(file=entry.path, sha256=entry.sha256, bytes=entry.bytes)
    (tmp_path / entry.path).write_bytes((tmp_path / "other" / entry.path).read_bytes())
    write_body(tmp_path, body)
    _assert_refused(tmp_path, f"{entry.path}: belongs to the shared weights {other.shared_sha256}", store.shared_sha256)


def test_a_damaged_bank_is_not_saved_over(tmp_path):
    new_bank(tmp_path)
    data = (tmp_path / "bank.json").read_bytes()
    (tmp_path / "bank.json").write_bytes(data[:-1])
    before = files(tmp_path)
    with pytest.raises(BankError, match=r"bank\.json: damaged"):
        new_bank(tmp_path)
    assert files(tmp_path) == before
    (tmp_path / "bank.json").unlink()
    new_bank(tmp_path).verify()


def test_saving_again_mends_a_damaged_file(tmp_path):
    store = new_bank(tmp_path)
    whole = files(tmp_path)
    path = tmp_path / store.entry("a")["file"]
    for damaged in (path.read_bytes()[:-1] + b"?", b""):
        path.write_bytes(damaged)
        new_bank(tmp_path)
        assert path.read_bytes() == whole[store.entry("a")["file"]]
    path.unlink()
    new_bank(tmp_path).verify()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "cut"])
def test_a_reference_to_a_lost_file(tmp_path, damage):
    store = new_bank(tmp_path)
    damage(tmp_path / store.entry("a")["file"])
    before = files(tmp_path)
    with pytest.raises(BankError, match=r"tasks/a-.*(missing|damaged)"):
        save(tmp_path, META, shared(), [("a", (store, "a")), ("c", packed(2))])
    assert files(tmp_path) == before


def test_killed_at_random_moments(tmp_path):
    assert _run("random_kills", tmp_path)["debris"] > 0, "the kills hit saves in progress"


def test_killed_before_every_change_of_the_disk(tmp_path):
    counts = _run("aimed_kills", tmp_path)
    # 8 tasks and the shared weights: a write, an fsync and a rename each; two folders; bank.json's write, fsync, rename
    assert counts["old"] >= 9 * 3 + 2 + 3 and counts["new"] == 1, counts


def test_the_first_save_killed(tmp_path):
    counts = _run("first_save_killed", tmp_path)
    assert counts["none"] >= 10 * 3 + 2 + 3 and counts["new"] == 1, counts


def test_a_limit_on_the_size_of_files(tmp_path):
    assert _run("size_limit", tmp_path)["refused"] >= 4


def test_a_full_disk_at_every_write(tmp_path):
    """No space from the nth write, fsync or rename on: the old bank, and nothing that was not there before."""
    store = new_bank(tmp_path)
    before = files(tmp_path)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = committed = 0
    for nth in range(1, 100):
        try:
            with at_call(nth, full):
                save(tmp_path, META, shared(1), [("a", (store, "a")), ("c", packed(2)), ("d", logits(3))])
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed += 1
        if (tmp_path / "bank.json").read_bytes() == before["bank.json"]:
            assert files(tmp_path) == before
        else:
            # The rename is done, its fsync failed: after a power failure it may be undone, so the old files are kept
            committed += 1
            assert Store.open(tmp_path).tasks == ["a", "c", "d"] and files(tmp_path).keys() > before.keys()
            Store.open(tmp_path).verify()
            (tmp_path / "bank.json").write_bytes(before["bank.json"])
            Store.open(tmp_path).verify()
            store = new_bank(tmp_path)
            before = files(tmp_path)
    assert failed >= 3 * 4 + 2 + 3 and committed == 1
    Store.open(tmp_path).verify()


def test_what_killed_saves_left_makes_room_first(tmp_path):
    new_bank(tmp_path)
    left = [tmp_path / "tasks" / f"a-{'0' * 32}.safetensors{end}" for end in ("", ".tmp")]
    for path in left:
        path.write_bytes(b"x")

    def full() -> None:
        assert not any(path.exists() for path in left)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"), at_call(2, full):  # the first call makes the folder, before it is locked
        save(tmp_path, META, shared(1), [])


def test_an_interrupt_removes_what_was_written(tmp_path):
    new_bank(tmp_path)
    before = files(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for nth in (1, 4):
        with pytest.raises(KeyboardInterrupt), at_call(nth, interrupt):
            save(tmp_path, META, shared(1), [("c", packed(2))])
        assert files(tmp_path) == before


def test_readers_while_one_writes(tmp_path):
    counts = _run("readers", tmp_path)
    assert counts["read"] >= 600 and counts["newer"] >= 3 and counts["changed"] >= 3, counts


def test_a_reader_follows_a_task(tmp_path):
    reader = new_bank(tmp_path)
    mapped = reader.task("a")
    writer = save(tmp_path, META, shared(), [("a", packed(5)), ("b", logits(6)), ("c", packed(7))])
    assert torch.equal(mapped["bits/fc.weight"], packed(0)[0]["bits/fc.weight"]), "what is mapped stays"
    assert reader.entry("b")["packed"] is True and reader.task("b").keys() == logits(6)[0].keys()
    assert reader.entry("b")["packed"] is False, "the entry is that of the file which task() gave"
    assert torch.equal(reader.task("a")["bits/fc.weight"], packed(5)[0]["bits/fc.weight"])
    assert reader.tasks == ["a", "b"] and reader.shared().keys() == shared().keys()
    reader.verify()
    # The state of the beginning again: the index is newer, though its files have the old names
    save(tmp_path, META, shared(), [("a", packed(0)), ("b", packed(1))])
    assert torch.equal(reader.task("a")["bits/fc.weight"], packed(0)[0]["bits/fc.weight"])
    del writer


def test_a_file_that_is_gone_and_comes_back(tmp_path, monkeypatch):
    """The bank of the beginning is saved again while the reader turns to the index: that is no missing file."""
    reader = new_bank(tmp_path)
    save(tmp_path, META, shared(), [("a", packed(5)), ("b", packed(1))])
    read_index = store_module.read_index

    def late(folder: Path) -> Index:
        monkeypatch.undo()
        new_bank(tmp_path)
        return read_index(folder)

    monkeypatch.setattr(store_module, "read_index", late)
    assert torch.equal(reader.task("a")["bits/fc.weight"], packed(0)[0]["bits/fc.weight"])


def test_a_copy_of_a_task_that_was_saved_again(tmp_path):
    """The newer tensors come with the newer info."""
    one = new_bank(tmp_path / "one")
    save(tmp_path / "one", META, shared(), [("a", logits(5)), ("b", packed(1))])
    two = save(tmp_path / "two", META, shared(), [("a", (one, "a"))])
    assert two.task("a").keys() == logits(5)[0].keys() and two.entry("a")["packed"] is False


@pytest.mark.parametrize(
    ("meta", "seed", "tasks", "message"),
    [
        (META, 1, [("a", packed(5))], "other shared weights"),
        ({**META, "x": 1}, 0, [("a", packed(5))], "other settings"),
        (META, 0, [None, ("b", packed(1))], "task 'a' is no longer in slot 0"),
        (META, 0, [("b", packed(1)), ("a", packed(5))], "task 'a' is no longer in slot 0"),
        (META, 0, [], "task 'a' is no longer in slot 0"),
    ],
)
def test_a_reader_does_not_follow_another_bank(tmp_path, meta, seed, tasks, message):
    reader = new_bank(tmp_path)
    save(tmp_path, meta, shared(seed), tasks)
    for use in (lambda: reader.task("a"), reader.verify):
        with pytest.raises(BankError, match=rf"bank\.json: the bank was changed since it was opened: .*{message}.*Open it again"):
            use()


def test_a_reader_of_a_deleted_bank(tmp_path):
    reader = new_bank(tmp_path)
    for name in files(tmp_path):
        (tmp_path / name).unlink()
    for use in (reader.shared, lambda: reader.task("a")):
        with pytest.raises(BankNotFoundError, match="there is no bank here"):
            use()


def test_a_second_writer_is_refused(tmp_path):
    new_bank(tmp_path)
    before = files(tmp_path)
    with locked_bank(tmp_path), pytest.raises(BankError, match=r"bank\.lock: another process is writing"):
        save(tmp_path, META, shared(), [])
    assert files(tmp_path) == before
    assert save(tmp_path, META, shared(), []).tasks == []


def test_a_save_from_an_old_state_is_refused(tmp_path):
    """It would undo the save in between."""
    old = new_bank(tmp_path)
    new = save(tmp_path, META, shared(), [("a", (old, "a")), ("b", (old, "b")), ("c", packed(2))])
    before = files(tmp_path)
    with pytest.raises(BankError, match=r"bank\.json: was saved again since this bank was opened. Open it again"):
        save(tmp_path, META, shared(), [("a", (old, "a")), ("d", packed(3))])
    assert files(tmp_path) == before
    # Also when the old one has read the new index meanwhile
    save(tmp_path, META, shared(), [("a", packed(8)), ("c", (new, "c"))])
    assert old.task("a")
    with pytest.raises(BankError, match="was saved again"):
        save(tmp_path, META, shared(), [("a", (old, "a"))])


def test_two_writers_lose_nothing(tmp_path):
    assert _run("writers", tmp_path)["refused"] > 0


def test_messages_name_the_whole_path(tmp_path):
    store = new_bank(tmp_path)
    path = tmp_path / store.entry("a")["file"]
    path.write_bytes(b"")
    with pytest.raises(BankError, match=f"^{re.escape(str(path))}: damaged, 0 bytes instead of {store.bytes_per_task('a')}$"):
        Store.open(tmp_path).task("a")
