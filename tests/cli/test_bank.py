"""``metamask bank``: what it prints, what it changes, and its exit codes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.banks import META, contents, files, logits, new_bank, packed, read_body, shared
from support.closeness import assert_close
from typer.testing import CliRunner

import metamask_ext
from metamask_ext.bank import BankError, Store, save
from metamask_ext.bank.export import task_state
from metamask_ext.bank.writer import locked_bank
from metamask_ext.cli import app


def _bank(*arguments: object):
    return CliRunner().invoke(app.app, ["bank", *map(str, arguments)])


def _assert_done(result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def _assert_errors(result, code: int, *lines: str) -> None:
    """One line each, in order."""
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    got = result.stderr.splitlines()
    assert len(got) == len(lines) and all(line.startswith("error: ") and text in line for line, text in zip(got, lines)), got


def test_ls(tmp_path):
    names = ["b", "a c", "[red]x", "two\nlines", "日本"]
    save(tmp_path, META, shared(), [(names[0], packed(0)), None, *((name, logits(1)) for name in names[1:])])
    assert _assert_done(_bank("ls", tmp_path)).splitlines() == ["b", "a c", "[red]x", "two%0Alines", "日本"]
    assert _assert_done(_bank("ls", new_bank(tmp_path / "empty", []).directory)) == ""


def test_ls_is_a_table_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    store = save(tmp_path, META, shared(), [("b", packed(0)), None, ("[red]x", logits(1))])
    output = _assert_done(_bank("ls", tmp_path))
    (bits,) = (line for line in output.splitlines() if " bits " in line)
    (floats,) = (line for line in output.splitlines() if " logits " in line)
    assert all(text in bits for text in (" b ", " 0 ", f" {store.bytes_per_task('b')} "))
    assert all(text in floats for text in (" [red]x ", " 2 ", f" {store.bytes_per_task('[red]x')} "))


def test_rm(tmp_path):
    new_bank(tmp_path, ["a", "b", "c"])
    before = contents(Store.open(tmp_path))
    assert _assert_done(_bank("rm", tmp_path, "c", "a")) == ""
    store = Store.open(tmp_path)
    assert store.tasks == [None, "b", None] and len(list((tmp_path / "tasks").iterdir())) == 1
    for key, tensor in before["tasks"][1][1].items():
        assert torch.equal(store.task("b")[key], tensor)
    unchanged = files(tmp_path)
    _assert_errors(_bank("rm", tmp_path, "b", "a"), 2, "has no task 'a'")
    assert files(tmp_path) == unchanged


def test_add(tmp_path):
    one = save(tmp_path / "one", META, shared(), [("a", packed(0)), None, ("b", logits(1))])
    two = save(tmp_path / "two", META, shared(), [("x", packed(2)), ("y", logits(3)), None, ("z", packed(4))])
    was = files(two.directory)
    _assert_done(_bank("add", one.directory, two.directory, "y"))
    assert Store.open(one.directory).tasks == ["a", None, "b", "y"]
    _assert_errors(_bank("add", one.directory, two.directory), 1, "has a task 'y' already")
    _assert_done(_bank("rm", one.directory, "y"))
    _assert_done(_bank("add", one.directory, two.directory))
    store = Store.open(one.directory)
    assert store.tasks == ["a", None, "b", None, "x", "y", "z"] and files(two.directory) == was
    store.verify()
    for name in "xyz":
        assert store.entry(name) == two.entry(name)
        assert all(torch.equal(store.task(name)[key], tensor) for key, tensor in two.task(name).items())


@pytest.mark.parametrize(
    ("meta", "seed", "names", "code", "text"),
    [
        (META, 1, [], 1, "has other shared weights than"),
        ({"layers": {}}, 0, [], 1, "has other settings than"),
        ({**META, "extra": 1}, 0, [], 1, ": extra"),
        (META, 0, ["c", "nope"], 2, "has no task 'nope'"),
        (META, 0, ["c", "a"], 1, "has a task 'a' already"),
    ],
)
def test_add_refuses(tmp_path, meta, seed, names, code, text):
    one = new_bank(tmp_path / "one")
    two = save(tmp_path / "two", meta, shared(seed), [("c", packed(2)), ("a", packed(3))])
    before = files(one.directory)
    _assert_errors(_bank("add", one.directory, two.directory, *names), code, text)
    assert files(one.directory) == before


def test_verify(tmp_path):
    store = new_bank(tmp_path)
    assert _assert_done(_bank("verify", tmp_path)) == "2 tasks, every file whole\n"
    damaged = [next(tmp_path.glob("shared-*")), tmp_path / store.entry("b")["file"]]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / store.entry("a")["file"]).unlink()
    _assert_errors(_bank("verify", tmp_path), 1, "shared-", f"{store.entry('a')['file']}: missing", f"{damaged[1].name}: damaged")


@pytest.mark.parametrize("command", ["ls", "rm", "add", "verify", "export"])
def test_every_command_refuses_what_is_no_bank(tmp_path, command):
    bank = new_bank(tmp_path / "bank").directory
    more = {"rm": ["a"], "add": [bank], "export": ["a", tmp_path / "file"]}.get(command, [])
    _assert_errors(_bank(command, tmp_path, *more), 1, f"{tmp_path / 'bank.json'}: there is no bank here")
    (bank / "bank.json").write_bytes(b"{}")
    _assert_errors(_bank(command, bank, *more), 1, "bank.json: damaged")
    assert not (tmp_path / "file").exists()


def test_a_locked_bank(tmp_path):
    new_bank(tmp_path)
    with locked_bank(tmp_path):
        _assert_errors(_bank("rm", tmp_path, "a"), 1, "another process is writing")
        assert _assert_done(_bank("ls", tmp_path)) == "a\nb\n"
    assert Store.open(tmp_path).tasks == ["a", "b"]


def _meta(model: torch.nn.Module) -> dict:
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, metamask_ext.nn.MaskedLayer):
            layers[name] = {
                "weight": list(layer.weight.shape),
                "bias": None if layer.bias is None else list(layer.bias.shape),
                "gate": layer.gate,
                "temperature": layer.temperature,
                "threshold": layer.threshold,
                "dtype": "float32",
            }
    return {"layers": layers}


def _pack(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """By the definition, bit by bit."""
    rows = (logits > threshold).reshape(len(logits), -1) if logits.dim() > 1 else (logits > threshold)[None]
    packed = torch.zeros(len(rows), -(-rows.shape[1] // 8), dtype=torch.uint8)
    for row in range(len(rows)):
        for k in range(rows.shape[1]):
            packed[row, k // 8] += int(rows[row, k]) << (k % 8)
    return packed if logits.dim() > 1 else packed[0]


@pytest.mark.parametrize("form", ["bits", "logits"])
@pytest.mark.parametrize(
    "gate", [{"gate": "sigmoid", "temperature": 0.5}, {"gate": "hard", "threshold": 0.25}], ids=["sigmoid", "hard"]
)
def test_export_is_the_plain_model(tmp_path, gate, form):
    """A merged model computes the same; a task's own state replaces what is shared."""
    if form == "bits" and gate["gate"] == "sigmoid":
        gate = {**gate, "temperature": 1e-30}  # the sigmoid of a packed task is 0 or 1
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        metamask_ext.nn.MaskedConv2d(2, 3, 3, **gate),
        torch.nn.BatchNorm2d(3),
        torch.nn.Flatten(),
        metamask_ext.nn.MaskedLinear(27, 11, bias=False, **gate),
        torch.nn.Linear(11, 2),
    )
    tensors = {}
    for name in _meta(model)["layers"]:
        layer = model.get_submodule(name)
        for part, masks in (("weight", layer.masks), ("bias", layer.bias_masks)):
            if getattr(layer, part) is not None:
                mask = masks["default"].detach()
                tensors[f"{form}/{name}.{part}"] = _pack(mask, layer.threshold) if form == "bits" else mask
    head = torch.randn(2, 11)
    tensors["state/4.weight"] = head
    weights = {key: value for key, value in model.state_dict().items() if "masks" not in key}
    save(tmp_path / "bank", _meta(model), weights, [("a", (tensors, {"packed": form == "bits"}))])

    _assert_done(_bank("export", tmp_path / "bank", "a", tmp_path / "a.safetensors"))
    plain = metamask_ext.merge(model, "default")
    plain.load_state_dict(state := load_file(tmp_path / "a.safetensors"))
    with torch.no_grad():
        merged = metamask_ext.merge(model, "default").eval()
        merged[4].weight.copy_(head)
        x = torch.randn(5, 2, 5, 5)
        torch.testing.assert_close(plain.eval()(x), merged(x))
    for key, tensor in merged.state_dict().items():
        if key.startswith(("0.", "3.")):
            assert_close(state[key], tensor.double(), key)  # the gate of merge is the kernel's, that of export reference.py's
        else:
            assert torch.equal(state[key], tensor), key
    assert any(bool((state[key] != weights[key]).any()) for key in ("0.weight", "3.weight")), "masks had an effect"

    before = files(tmp_path)
    _assert_errors(_bank("export", tmp_path / "bank", "a", tmp_path / "a.safetensors"), 1, "File exists")
    _assert_errors(_bank("export", tmp_path / "bank", "b", tmp_path / "b.safetensors"), 2, "has no task 'b'")
    _assert_errors(_bank("export", tmp_path / "bank", "a", tmp_path / "no" / "b.safetensors"), 1, "No such file")
    assert files(tmp_path) == before


def test_export_of_a_layer_that_is_the_model(tmp_path):
    layer = metamask_ext.nn.MaskedLinear(3, 2)
    tensors = {"logits/weight": layer.masks["default"].detach(), "logits/bias": layer.bias_masks["default"].detach()}
    store = save(tmp_path, _meta(layer), {"weight": layer.weight, "bias": layer.bias}, [("a", (tensors, {}))])
    plain = metamask_ext.merge(layer, "default").state_dict()
    for key in ("weight", "bias"):
        assert_close(task_state(store, "a")[key], plain[key].double(), key)


def _without(key: str) -> dict:
    return {name: tensor for name, tensor in packed(0)[0].items() if name != key}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_without("bits/fc.weight"), "must have bits or logits for fc.weight, got neither"),
        (_without("bits/fc.bias"), "must have bits or logits for fc.bias, got neither"),
        ({**packed(0)[0], **logits(0)[0]}, "must have bits or logits for fc.weight, got both"),
        ({**packed(0)[0], "bits/fc.weight": torch.zeros(5, 3, dtype=torch.uint8)}, r"fc.weight: bits must be torch.uint8 \[5, 2\]"),
        (
            {**packed(0)[0], "bits/fc.bias": torch.zeros(5)},
            r"fc.bias: bits must be torch.uint8 \[1\] for the shape \[5\], got torch.float",
        ),
        ({**logits(0)[0], "logits/fc.weight": torch.zeros(9)}, "fc.weight: logits/fc.weight must have the shape of fc.weight"),
        ({**logits(0)[0], "logits/fc.weight": torch.zeros(5, 9).double()}, "logits/fc.weight must have the dtype"),
        ({**packed(0)[0], "bits/other.weight": torch.zeros(1)}, "'bits/other.weight' of task 'a' belongs to no masked weight"),
    ],
)
def test_export_refuses_masks_that_do_not_fit(tmp_path, tensors, message):
    store = save(tmp_path, META, shared(), [("a", (tensors, {}))])
    with pytest.raises(BankError, match=rf"tasks/a-\w+\.safetensors: .*{message}"):
        task_state(store, "a")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "meta does not describe the masked layers"),
        ({"layers": {"fc": 3}}, "meta does not describe the masked layers"),
        ({"layers": {"fc": {"bias": [5]}}}, "meta does not describe the masked layers"),
        ({"layers": {"fc": {"weight": [5, 8]}}}, r"fc.weight has the shape \[5, 8\], its weights have \[5, 9\]"),
        ({"layers": {"head": {"weight": [5, 9]}}}, r"head.weight has the shape \[5, 9\], its weights have none"),
    ],
)
def test_export_refuses_settings_that_do_not_fit(tmp_path, meta, message):
    store = save(tmp_path, meta, shared(), [("a", packed(0))])
    with pytest.raises(BankError, match=rf"bank\.json: .*{message}"):
        task_state(store, "a")


def test_a_gate_that_does_not_exist(tmp_path):
    meta = {"layers": {"fc": {**META["layers"]["fc"], "gate": "soft"}}}
    with pytest.raises(BankError, match=r"fc.weight: gate must be one of .*got 'soft'"):
        task_state(save(tmp_path, meta, shared(), [("a", logits(0))]), "a")


def test_a_full_disk_leaves_no_half_export(tmp_path):
    """In a process of its own, in which no file may grow past 100 bytes."""
    new_bank(tmp_path / "bank")
    program = (
        "import resource, sys; from metamask_ext.cli import app; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        f"sys.argv = ['metamask', 'bank', 'export', {str(tmp_path / 'bank')!r}, 'a', {str(tmp_path / 'file')!r}]; app.main()"
    )
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "file").exists()


def test_a_copied_folder_is_a_bank(tmp_path):
    """cp and rsync are ways to copy banks: the index holds no path outside of the folder, and no time."""
    new_bank(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    _assert_done(_bank("verify", tmp_path / "two"))
    assert str(tmp_path) not in Path(tmp_path / "two" / "bank.json").read_text() and read_body(tmp_path / "two")["commit"] == 0
