"""Banks that others made, on file systems that others chose: links, read-only folders, no locks, forged settings, few mappings."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.banks import META, files, logits, packed, read_body, shared, write_body
from support.banks import new_bank as new_store
from torch import nn

from metamask_ext import MaskBank
from metamask_ext.bank import BankError, Store, save
from metamask_ext.bank import mappings as mappings_module
from metamask_ext.bank.export import task_state
from metamask_ext.bank.writer import LOCK, locked_bank
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d


def net(gate: str = "sigmoid") -> nn.Sequential:
    return nn.Sequential(
        MaskedConv2d(1, 2, 3, gate=gate), TaskBatchNorm2d(2), nn.Flatten(), MaskedLinear(2, 3, gate=gate), nn.Linear(3, 2)
    )


def new_bank(folder: Path, gate: str = "sigmoid", tasks: str = "ab") -> MaskBank:
    bank = MaskBank(net(gate), per_task="4.*")
    for task in tasks:
        bank.add_task(task)
    bank.pack("a")
    bank.save(folder)
    return bank


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must not change."""
    layers = [layer for layer in model.modules() if isinstance(layer, (MaskedLinear, MaskedConv2d))]
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": [id(parameter) for parameter in model.parameters()],
        "settings": [(layer.gate, layer.temperature, layer.threshold) for layer in layers],
        "modules": [type(module) for module in model.modules()],
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    tensors = now.pop("tensors"), before.pop("tensors")
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert now == before


def of_layer(**entries: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["meta"]["layers"]["3"].update(entries)


WRONG = [float("nan"), float("inf"), "x", "1.0", None, [1], {}, True, 10**400]
NUMBERS = [-1, 0, 1e-300, 2**-127, *WRONG]
CHANGES: dict[str, list[Callable[[dict[str, Any]], None]]] = {
    "temperature": [of_layer(temperature=value) for value in NUMBERS],
    "threshold": [of_layer(threshold=value) for value in WRONG],
    "gate": [of_layer(gate=value) for value in ("hardest", "", 3, None, ["sigmoid"])],
    "dtype": [of_layer(dtype=value) for value in ("float16", "torch.float32", 3, None)],
    "weight": [
        of_layer(weight=value) for value in ([3, 3], [3.0, 2.0], [-3, -2], [True, 2], "32", None, 6, [3, 2**70], [[3], [2]])
    ],
    "bias": [of_layer(bias=value) for value in ([4], 3, "3", [3.0], None)],
    "layers": [
        lambda body, v=value: body["meta"].update(layers=v) for value in ([], None, 3, "x", {}, {"3": []}, {"3": {}}, {"zz": 1})
    ],
    "per_task": [
        lambda body, v=value: body["meta"].update(per_task=v)
        for value in (
            [],
            None,
            "x",
            {},
            {"4": "weight"},
            {"4": [1, "weight"]},
            {"4": [["weight"]]},
            {"4": None},
            {"4": ["bias"] * 2},
            {"": []},
        )
    ],
    "per_task of others": [
        lambda body, k=path, v=names: body["meta"]["per_task"].update({k: v})
        for path in ("zz", "", "0", "2", "3", "0.masks", "3.bias_masks")
        for names in ([], ["weight"])
    ],
    "packed": [lambda body, v=value: body["tasks"][1]["info"].update(packed=v) for value in ("x", 1, None, [], {})],
    "commit": [lambda body, v=value: body.update(commit=v) for value in (-1, True, 1.0, "1", None, 2**63)],
    "bytes": [lambda body, v=value: body["tasks"][1].update(bytes=v) for value in (True, 1.0, -1, 2**63, None)],
    "name": [lambda body, v=value: body["tasks"][1].update(name=v) for value in ("", 1, None, [], "default")],
    "deep": [lambda body, v=value: body["meta"].update(x=v) for value in (json.loads("[" * 200 + "]" * 200),)],
}


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_forged_settings(tmp_path, field, gate):
    """Refused before the model has changed, wherever the value stands."""
    new_bank(tmp_path, gate)
    body = read_body(tmp_path)
    model = net(gate)
    before = state(model)
    for number, change in enumerate(CHANGES[field]):
        if field == "temperature" and gate == "hard" and NUMBERS[number] in (-1, 0, 1e-300, 2**-127):
            continue  # a hard gate has none: any number will do
        forged = json.loads(json.dumps(body))
        change(forged)
        write_body(tmp_path, forged)
        with pytest.raises(BankError, match=r"bank\.json: "):
            MaskBank.load(tmp_path, model)
        assert_same(state(model), dict(before))
        if field in ("temperature", "threshold", "gate", "layers"):
            with pytest.raises(BankError):
                task_state(Store.open(tmp_path), "b")
    write_body(tmp_path, body)
    assert MaskBank.load(tmp_path, model).tasks == ["default", "a", "b"]


def raw(text: bytes) -> bytes:
    first = b'{"metamask_bank": 1,\n'
    return first + b'"sha256": "%s",\n' % hashlib.sha256(first + text).hexdigest().encode() + text


@pytest.mark.parametrize(
    "text",
    [
        b'"commit": 0, "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'"commit": 0, "meta": {}, "shared": null, "tasks": [' + b"null," * 5_000_000 + b"null]}",
        b'"commit": 0, "meta": {"x": NaN}, "shared": null, "tasks": []}',
        b'"commit": 0, "meta": {"x": 1e999}, "shared": null, "tasks": []}',
        b'"commit": 0, "meta": {}, "shared": "\xff", "tasks": []}',
        b'"commit": ' + b"9" * 5000 + b"}",
        b"3]",
    ],
    ids=["deep", "nulls", "nan", "infinity", "bytes", "digits", "no object"],
)
def test_an_index_of_another_shape(tmp_path, text):
    (tmp_path / "bank.json").write_bytes(raw(text))
    with pytest.raises(BankError, match=r"bank\.json: not the index of a bank"):
        Store.open(tmp_path)


def test_an_index_without_end(tmp_path):
    with open(tmp_path / "bank.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BankError, match=r"bank\.json: cannot be read: 1,099,511,627,776 bytes"):
        Store.open(tmp_path)
    (tmp_path / "bank.json").unlink()
    os.mkfifo(tmp_path / "bank.json")
    with pytest.raises(BankError, match=r"bank\.json: cannot be read: not a regular file"):
        Store.open(tmp_path)


def linked(real: Path, snapshot: Path) -> None:
    """Links to the files of a bank, in folders of their own, as download caches make them."""
    for path in real.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(real)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


class TestLinks:
    def test_a_bank_of_links_is_read(self, tmp_path):
        bank = new_bank(tmp_path / "real")
        linked(tmp_path / "real", tmp_path / "snapshot")
        for path in (tmp_path / "snapshot").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (tmp_path / "snapshot").chmod(0o555)
        loaded = MaskBank.load(tmp_path / "snapshot", net())
        loaded.verify()
        assert loaded.tasks == bank.tasks
        for name, tensor in bank.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor)
        (tmp_path / "snapshot").chmod(0o755), (tmp_path / "snapshot" / "tasks").chmod(0o755)

    def test_a_link_to_the_folder_of_tasks(self, tmp_path):
        new_bank(tmp_path / "real")
        (tmp_path / "tasks").symlink_to(tmp_path / "real" / "tasks")
        for name in ("bank.json", *(path.name for path in (tmp_path / "real").glob("shared*"))):
            (tmp_path / name).symlink_to(tmp_path / "real" / name)
        bank = MaskBank.load(tmp_path, net())
        before = files(tmp_path / "real")
        bank.add_task("c")
        with pytest.raises(BankError, match="tasks: a symbolic link, through which nothing is written"):
            bank.save(tmp_path)
        assert files(tmp_path / "real") == before

    def test_a_save_replaces_links_and_writes_through_none(self, tmp_path):
        new_bank(tmp_path / "real")
        linked(tmp_path / "real", tmp_path / "snapshot")
        before = files(tmp_path / "real")
        bank = MaskBank.load(tmp_path / "snapshot", net())
        bank.add_task("c")
        bank.save(tmp_path / "snapshot")
        assert files(tmp_path / "real") == before and (tmp_path / "real" / LOCK).read_bytes() == b""
        own = [path for path in (tmp_path / "snapshot").rglob("*") if path.is_file() and path.name != LOCK]
        assert not any(path.is_symlink() for path in own) and len(own) == len(before) + 1
        again = MaskBank.load(tmp_path / "snapshot", net())
        again.verify()
        assert again.tasks == ["default", "a", "b", "c"]

    def test_a_link_to_other_contents(self, tmp_path):
        store = new_store(tmp_path / "bank")
        path = tmp_path / "bank" / store.entry("a")["file"]
        for target in ("/dev/zero", "/etc/passwd", str(tmp_path), str(tmp_path / "nowhere"), str(path)):
            path.unlink()
            path.symlink_to(target)
            for use in (lambda: Store.open(tmp_path / "bank").task("a"), Store.open(tmp_path / "bank").verify):
                with pytest.raises(BankError, match=path.name):
                    use()


class TestFileSystems:
    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK], ids=errno.errorcode.get)
    def test_without_flock(self, tmp_path, monkeypatch, number):
        def flock(*given: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        bank = new_bank(tmp_path)
        with locked_bank(tmp_path), pytest.raises(BankError, match=r"bank\.lock: cannot be locked: .*held' was made by process"):
            bank.save(tmp_path)
        bank.save(tmp_path)
        assert not list(tmp_path.glob("*.held"))

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP], ids=errno.errorcode.get)
    def test_folders_that_cannot_be_synced(self, tmp_path, monkeypatch, number):
        fsync = os.fsync

        def of_files(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", of_files)
        new_bank(tmp_path / "new" / "bank")
        assert MaskBank.load(tmp_path / "new" / "bank", net()).tasks == ["default", "a", "b"]

    def test_errors_name_the_file_and_the_first_is_kept(self, tmp_path, monkeypatch):
        bank = new_bank(tmp_path)
        before = files(tmp_path)
        bank.add_task("c")

        def full(*given: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def unlink(path: object, **options: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(os, "write", full)
        monkeypatch.setattr(os, "unlink", unlink)
        monkeypatch.setattr(Path, "unlink", unlink)
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/tasks/c-"):
            bank.save(tmp_path)
        monkeypatch.undo()
        assert before.items() <= files(tmp_path).items()
        bank.save(tmp_path)
        assert len(files(tmp_path)) == len(before) + 1, "what was left is gone"

    def test_an_error_after_the_commit(self, tmp_path, monkeypatch):
        """The folder holds what was saved: the next save is not refused as if another had saved there, and no task is lost."""
        new_bank(tmp_path)
        bank = MaskBank.load(tmp_path, net())
        bank.add_task("c")
        replace, fsync = os.replace, os.fsync

        def failing(descriptor: int) -> None:
            if committed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(descriptor)

        committed: list[object] = []
        monkeypatch.setattr(os, "fsync", failing)
        monkeypatch.setattr(
            os, "replace", lambda *given: committed.append(given) if replace(*given) or "bank.json" in str(given) else None
        )
        with pytest.raises(OSError, match="Input/output error"):
            bank.save(tmp_path)
        monkeypatch.undo()
        assert Store.open(tmp_path).tasks == ["default", "a", "b", "c"]
        bank.remove_task("b")
        bank.save(tmp_path)
        assert MaskBank.load(tmp_path, net()).tasks == ["default", "a", "c"]

    def test_a_clean_up_that_fails(self, tmp_path, monkeypatch):
        bank = new_bank(tmp_path)
        bank.remove_task("b")

        def unlink(path: object, **options: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        monkeypatch.setattr(os, "unlink", unlink)
        bank.save(tmp_path)
        monkeypatch.undo()
        count = len(files(tmp_path))
        bank.save(tmp_path)
        assert Store.open(tmp_path).tasks == ["default", "a", None] and len(files(tmp_path)) == count - 1

    def test_temporary_names_cannot_be_prepared(self, tmp_path):
        store = new_store(tmp_path / "bank")
        (tmp_path / "victim").write_text("precious")
        names = ["bank.json", store.entry("a")["file"]]
        save(tmp_path / "bank", META, shared(), [("b", packed(1))])
        for name in names:
            (tmp_path / "bank" / f"{name}.tmp").symlink_to(tmp_path / "victim")
        new_store(tmp_path / "bank").verify()
        assert (tmp_path / "victim").read_text() == "precious" and not list((tmp_path / "bank").rglob("*.tmp"))

    def test_a_process_forked_during_a_save_keeps_no_lock(self, tmp_path, monkeypatch):
        bank = new_bank(tmp_path)
        reading, writing = os.pipe()
        replace, children = os.replace, []

        def forking(*given: Any) -> None:
            replace(*given)
            if not children:
                child = os.fork()
                if child == 0:
                    os.close(writing)
                    os.read(reading, 1)
                    os._exit(0)
                children.append(child)

        monkeypatch.setattr(os, "replace", forking)
        bank.save(tmp_path)
        monkeypatch.undo()
        assert len(children) == 1 and os.waitpid(children[0], os.WNOHANG) == (0, 0), "a process forked amid the save lives"
        bank.save(tmp_path)
        os.close(writing), os.close(reading)
        os.waitpid(children[0], 0)


class TestSaveAmidASave:
    def test_it_is_refused(self, tmp_path, monkeypatch):
        """As a signal handler does it."""
        bank = new_bank(tmp_path)
        bank.add_task("c")
        replace, refused = os.replace, []

        def saving(*given: Any) -> None:
            if not refused:
                refused.append(pytest.raises(BankError, match="under way in this thread"))
                with refused[0]:
                    bank.save(tmp_path)
            replace(*given)

        monkeypatch.setattr(os, "replace", saving)
        bank.save(tmp_path)
        assert refused
        bank.save(tmp_path)
        Store.open(tmp_path).verify()


class TestMappings:
    @staticmethod
    def mapped(folder: Path) -> int:
        return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())

    @pytest.mark.parametrize(("most", "expected"), [(None, 6), (6, 6), (2, 2), (0, 0)])
    def test_mappings_are_bounded(self, tmp_path, monkeypatch, most, expected):
        monkeypatch.setattr(mappings_module, "COPIED", 0)
        model = nn.Sequential(MaskedLinear(9, 5), MaskedLinear(5, 5))
        bank = MaskBank(model)
        for task in "abcdef":
            bank.add_task(task)
            bank.pack(task)
        bank.remove_task("default")
        bank.save(tmp_path)
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = MaskBank.load(tmp_path, nn.Sequential(MaskedLinear(9, 5), MaskedLinear(5, 5)), max_resident=most)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())
        assert self.mapped(tmp_path / "tasks") == expected
        loaded.add_task("g")
        loaded.save(tmp_path)
        loaded.verify()
        assert self.mapped(tmp_path / "tasks") <= expected
        del loaded
        again = MaskBank.load(tmp_path, nn.Sequential(MaskedLinear(9, 5), MaskedLinear(5, 5)), max_resident=most)
        assert again.model.state_dict() and self.mapped(tmp_path / "tasks") == expected, "what is gone is not counted"

    def test_a_place_is_had_from_the_decision_on(self):
        mappings = mappings_module.Mappings(2)
        size = mappings_module.COPIED + 1
        assert [mappings.allows(size) for _ in range(3)] == [True, True, False]
        mappings.give_back()
        assert [mappings.allows(size) for _ in range(2)] == [True, False]
        tensor = torch.ones(1)
        mappings.note([tensor])
        mappings.give_back()
        assert [mappings.allows(size) for _ in range(2)] == [True, False]

    def test_a_file_that_cannot_be_mapped_takes_no_place(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mappings_module, "COPIED", 0)
        store = new_store(tmp_path)
        store.mappings = mappings_module.Mappings(1)
        path = store.path("a")
        data = path.read_bytes()
        path.write_bytes(bytes(len(data)))
        with pytest.raises(BankError):
            store.task("a")
        path.write_bytes(data)
        kept = store.task("a")
        assert kept and self.mapped(tmp_path) == 1

    def test_small_files_are_not_mapped(self, tmp_path):
        store = new_store(tmp_path)
        kept = [store.task(name) for name in "ab" for _ in range(5)]
        assert len(kept) == 10 and self.mapped(tmp_path) == 0

    @pytest.mark.parametrize(("most", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
    def test_refused_bounds(self, tmp_path, most, error):
        new_store(tmp_path)
        model = nn.Sequential(MaskedLinear(9, 5))
        for make in (lambda: MaskBank(model, max_resident=most), lambda: MaskBank.load(tmp_path, model, max_resident=most)):
            with pytest.raises(error, match="max_resident must be"):
                make()

    def test_what_is_read_is_what_was_checked(self, tmp_path):
        store = new_store(tmp_path)
        first = store.task("a")
        path = store.path("a")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(BankError, match="damaged, its SHA-256"):
            store.task("a")
        assert torch.equal(first["bits/fc.bias"], packed(0)[0]["bits/fc.bias"])


def test_saves_while_other_threads_add_and_remove_tasks(tmp_path):
    bank = new_bank(tmp_path)
    stop = threading.Event()
    failures: list[BaseException] = []

    def change(name: str) -> None:
        try:
            while not stop.is_set():
                bank.add_task(name)
                bank.pack(name)
                bank.remove_task(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=change, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            bank.save(tmp_path)
            store = Store.open(tmp_path)
            store.verify()
            assert {"default", "a", "b"} <= set(store.tasks)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_task_with_a_dtype_that_is_unknown(tmp_path):
    store = save(tmp_path, META, shared(), [("a", logits(0))])
    path = store.path("a")
    data = path.read_bytes().replace(b'"F32"', b'"X99"')
    sha256 = hashlib.sha256(data).hexdigest()
    body = read_body(tmp_path)
    body["tasks"][0].update(file=f"tasks/a-{sha256[:32]}.safetensors", sha256=sha256)
    (tmp_path / body["tasks"][0]["file"]).write_bytes(data)
    write_body(tmp_path, body)
    with pytest.raises(BankError, match="not a safetensors file"):
        Store.open(tmp_path).task("a")
