"""The bank's folder: what is saved comes back, what is unchanged is not written, and only what is asked for is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.banks import META, contents, files, logits, new_bank, packed, shared

from metamask_ext.bank import BankError, BankNotFoundError, Store, save
from metamask_ext.bank.writer import DTYPES

NAMES = ["a", "A", "a.b", "keys", "../x", "..", ".", "/etc/passwd", "con", "a b", "\n", "\0", "%41", "ä", "\ud800", "日本" * 40]
LONG = ["x" * 300, "x" * 299 + "y", "X" * 300, "x" * 5000]


def _inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Reads what a rewrite changes even where the bytes stay the same."""
    paths = [path for path in folder.rglob("*.safetensors")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_round_trip(tmp_path):
    meta = {**META, "per_task": ["head.*"], "a number": 0.1, "nothing": None}
    saved = save(tmp_path / "new" / "bank", meta, shared(), [("a", packed(0)), None, ("b", logits(1)), None])
    for store in (saved, Store.open(tmp_path / "new" / "bank"), Store.open(str(tmp_path / "new" / "bank"))):
        assert store.meta == meta and store.tasks == ["a", None, "b", None]
        for got, wanted in ((store.shared(), shared()), (store.task("a"), packed(0)[0]), (store.task("b"), logits(1)[0])):
            assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
        entry = store.entry("b")
        path = tmp_path / "new" / "bank" / entry["file"]
        assert entry == {"packed": False, "file": entry["file"], "bytes": path.stat().st_size}
        assert store.bytes_per_task("b") == path.stat().st_size
        store.verify()


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_and_shape(tmp_path, dtype):
    values = torch.randint(0, 2, (3, 4, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"plain": values, "scalar": values[1, 1, 1], "empty": values[:0], "no-columns": values[:, :, :0], "": values[0]}
    views = {"transposed": values.transpose(0, 2), "gaps": values[:, ::2], "expanded": values[:1].expand(3, 4, 5)}
    store = save(tmp_path, {}, {**tensors, **views}, [("a", (tensors, {}))])
    for got, wanted in ((store.shared(), {**tensors, **views}), (store.task("a"), tensors)):
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert got[key].dtype == dtype and got[key].shape == tensor.shape, key
            bits, expected = (x.contiguous().flatten().view(torch.uint8) for x in (got[key], tensor))
            assert torch.equal(bits, expected), key


def test_ties_conjugates_and_parameters(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    turned = torch.randn(2, 2, dtype=torch.complex64).conj()
    store = save(tmp_path, {}, {"a": weight, "b": weight, "row": weight[1], "conj": turned, "neg": turned.imag}, [])
    got = store.shared()
    assert torch.equal(got["a"], weight) and torch.equal(got["b"], weight) and torch.equal(got["row"], weight[1])
    assert torch.equal(got["conj"], turned) and torch.equal(got["neg"], turned.imag)
    assert not any(tensor.requires_grad for tensor in got.values())


def test_an_empty_bank(tmp_path):
    assert contents(save(tmp_path, {}, {}, [])) == {"meta": {}, "shared": {}, "tasks": []}
    assert contents(save(tmp_path, {}, {}, [None, ("a", ({}, {}))]))["tasks"][1][1] == {}


@pytest.mark.parametrize("names", [NAMES, LONG], ids=["odd", "long"])
def test_any_name(tmp_path, names):
    store = new_bank(tmp_path, names)
    assert store.tasks == names == Store.open(tmp_path).tasks
    for slot, name in enumerate(names):
        assert all(torch.equal(store.task(name)[key], tensor) for key, tensor in packed(slot)[0].items()), name
    listed = [path.name for path in (tmp_path / "tasks").iterdir()]
    assert len(listed) == len({name.lower() for name in listed}) == len(names)
    assert all(len(name) <= 120 and name.isascii() for name in listed)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors") == ["bank.json", "bank.lock", "tasks"]


def test_a_task_is_small_on_disk(tmp_path):
    """LeNet-300-100 with 500 outputs: 317 kbit of masks, a header, and an entry of bank.json."""
    bits = {}
    for layer, (out, width) in {"fc1": (300, 784), "fc2": (100, 300), "fc3": (500, 100)}.items():
        bits[f"bits/{layer}.weight"] = torch.zeros(out, (width + 7) // 8, dtype=torch.uint8)
        bits[f"bits/{layer}.bias"] = torch.zeros(1, (out + 7) // 8, dtype=torch.uint8)
    without = save(tmp_path, {}, {}, [])
    index = len(files(tmp_path)["bank.json"])
    store = save(tmp_path, {}, without.shared(), [("task", (bits, {"packed": True}))])
    assert store.bytes_per_task("task") + len(files(tmp_path)["bank.json"]) - index <= 42_500


def test_appending_rewrites_nothing(tmp_path):
    store = new_bank(tmp_path)
    before = _inodes(tmp_path)
    kept = [(name, (store, name)) for name in store.tasks]
    store = save(tmp_path, store.meta, store.shared(), [*kept, ("c", packed(2))])
    after = _inodes(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert store.tasks == ["a", "b", "c"]
    # The same contents as tensors are not written either
    save(tmp_path, META, shared(), [(name, packed(slot)) for slot, name in enumerate("abc")])
    assert _inodes(tmp_path) == after
    # A changed task is; the file of what it was is deleted
    save(tmp_path, META, shared(), [("a", packed(0)), ("b", packed(7)), ("c", packed(2))])
    changed = _inodes(tmp_path)
    assert len(changed) == len(after) and len(changed.items() & after.items()) == len(after) - 1


def test_removed_slots(tmp_path):
    store = new_bank(tmp_path, ["a", "b", "c"])
    gone = tmp_path / store.entry("b")["file"]
    store = save(tmp_path, store.meta, store.shared(), [("a", (store, "a")), None, ("c", (store, "c"))])
    assert store.tasks == ["a", None, "c"] and not gone.exists()
    with pytest.raises(KeyError, match="no task 'b'"):
        store.task("b")
    # A new task of that name is another task, in another slot
    store = save(tmp_path, store.meta, store.shared(), [("a", (store, "a")), None, ("c", (store, "c")), ("b", packed(9))])
    assert Store.open(tmp_path).tasks == ["a", None, "c", "b"]


def test_renamed_and_equal_tasks(tmp_path):
    store = save(tmp_path, META, shared(), [("a", packed(0)), ("A", packed(0)), ("b", packed(0))])
    assert len(_inodes(tmp_path)) == 3, "the shared weights; one file for 'a' and 'A', which are equal; one for 'b'"
    store = save(tmp_path, META, shared(), [("new", (store, "A"))])
    assert torch.equal(store.task("new")["bits/fc.weight"], packed(0)[0]["bits/fc.weight"]) and len(_inodes(tmp_path)) == 2


def test_references_to_another_folder(tmp_path):
    one = new_bank(tmp_path / "one", ["a", "b"])
    two = save(tmp_path / "two", META, shared(), [("c", (one, "b"))])
    assert files(tmp_path / "two")[two.entry("c")["file"]] == files(tmp_path / "one")[one.entry("b")["file"]]
    assert two.entry("c")["packed"] is True
    two.verify(), one.verify()
    # A damaged one is not copied
    path = tmp_path / "one" / one.entry("a")["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = files(tmp_path / "two")
    with pytest.raises(BankError, match=path.name):
        save(tmp_path / "two", META, shared(), [("c", (two, "c")), ("a", (one, "a"))])
    assert files(tmp_path / "two") == before


def test_a_reference_under_other_shared_weights_is_written_for_them(tmp_path):
    store = new_bank(tmp_path)
    was = store.entry("a")["file"]
    store = save(tmp_path, META, shared(seed=1), [("a", (store, "a"))])
    assert torch.equal(store.task("a")["bits/fc.weight"], packed(0)[0]["bits/fc.weight"])
    assert store.entry("a")["file"] != was and store.entry("a")["packed"] is True
    store.verify()


def test_opening_reads_only_the_index(tmp_path):
    store = new_bank(tmp_path, ["a", "b", "c"])
    for path in [*tmp_path.glob("shared-*"), tmp_path / store.entry("b")["file"]]:
        path.write_bytes(b"damaged")
    store = Store.open(tmp_path)
    assert store.tasks == ["a", "b", "c"] and store.entry("b")["packed"] is True
    assert torch.equal(store.task("a")["bits/fc.weight"], packed(0)[0]["bits/fc.weight"]), "one task reads one file"
    with pytest.raises(BankError, match=r"tasks/b-.*damaged, 7 bytes instead of"):
        store.task("b")
    with pytest.raises(BankError, match=r"shared-.*damaged, 7 bytes instead of"):
        store.shared()
    with pytest.raises(BankError) as error:
        store.verify()
    assert len(str(error.value).splitlines()) == 2 and "shared-" in str(error.value) and "tasks/b-" in str(error.value)


def test_tensors_are_mapped_privately(tmp_path):
    large = torch.arange(1 << 20, dtype=torch.float32)
    store = save(tmp_path, {}, {}, [("a", ({"x": large}, {}))])
    got, before = store.task("a")["x"], files(tmp_path)
    address = got.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [line for line in ranges if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)]
    assert len(inside) == 1 and inside[0][-1] == str(tmp_path / store.entry("a")["file"])
    got.zero_()
    assert torch.equal(store.task("a")["x"], large) and files(tmp_path) == before
    # The mapping outlives the file
    kept = store.task("a")["x"]
    save(tmp_path, {}, {}, [])
    assert torch.equal(kept, large)


def test_a_folder_that_is_no_bank(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BankNotFoundError, match="bank.json: there is no bank here"):
            Store.open(folder)
    assert issubclass(BankNotFoundError, BankError) and issubclass(BankNotFoundError, FileNotFoundError)


def test_other_files_are_left_alone(tmp_path):
    new_bank(tmp_path)
    theirs = ["README", "shared.safetensors", "tasks/notes.txt", "tasks/a.safetensors", "bank.json.bak", "shared-x.safetensors"]
    ours = [
        "bank.json.tmp",
        f"shared-{'0' * 32}.safetensors",
        f"tasks/a-{'0' * 32}.safetensors",
        f"tasks/b-{'1' * 32}.safetensors.tmp",
    ]
    for name in theirs + ours:
        (tmp_path / name).write_text("x")
    before = set(files(tmp_path))
    store = save(tmp_path, META, shared(), [("a", packed(0)), ("b", packed(1))])
    assert set(files(tmp_path)) == before - set(ours)
    store.verify()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": [("a", packed(0)), ("b", packed(1)), ("a", packed(2))]}, ValueError, "different names, got 'a' 2 times"),
        ({"tasks": [("", packed(0))]}, ValueError, "must not be empty"),
        ({"tasks": [(3, packed(0))]}, TypeError, "must be a string, got int"),
        ({"tasks": [("c", ({"x": [1]}, {}))]}, TypeError, "task 'c': 'x' must be a dense tensor .* got list"),
        (
            {"tasks": [("c", ({"x": torch.eye(2).to_sparse()}, {}))]},
            TypeError,
            "'x' must be a dense tensor .* got torch.sparse_coo",
        ),
        (
            {"shared": {"x": torch.ones(1, dtype=torch.complex128)}},
            TypeError,
            "shared: 'x' must be .* got torch.strided, torch.complex128",
        ),
        ({"shared": {"__metadata__": torch.ones(1)}}, ValueError, "shared: a tensor's name .* '__metadata__'"),
        ({"tasks": [("c", ({}, {"file": 1}))]}, ValueError, "info of task 'c' must not have the key 'file'"),
        ({"tasks": [("c", ({}, {"x": float("nan")}))]}, ValueError, "JSON"),
        ({"meta": {"x": torch.ones(1)}}, TypeError, "JSON"),
    ],
)
def test_what_cannot_be_saved(tmp_path, arguments, error, message):
    new_bank(tmp_path)
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        save(tmp_path, **{"meta": META, "shared": shared(1), "tasks": [("new", packed(5))], **arguments})
    assert files(tmp_path) == before


def test_a_bank_by_another_path(tmp_path, monkeypatch):
    """A relative path, and a link to the whole folder, are the user's own choice."""
    os.symlink(tmp_path / "bank", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    store = new_bank(Path("bank"))
    before = _inodes(tmp_path / "bank")
    store = save(tmp_path / "link", META, shared(), [("a", (store, "a")), ("b", (Store.open("link"), "b"))])
    monkeypatch.chdir("/")
    assert store.task("a") and _inodes(tmp_path / "bank") == before
