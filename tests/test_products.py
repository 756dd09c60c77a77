"""The table of products: what decides, its file, what a process uses by default, and `metamask tune`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from support.loops import new_loop
from typer.testing import CliRunner

import metamask_ext
from metamask_ext import products, tuning
from metamask_ext.cli import app
from metamask_ext.experiments.engine.executors import one_thread
from metamask_ext.products import LARGEST, PANELS, Line, Table, modelled_table, read_table, through_blas, using_table

ONE = Table("one line", (Line("forward", "float32", 1, 1024, 1024, 512),))


def _rows(pass_: products.Pass, dtype: torch.dtype, in_features: int, out_features: int) -> int:
    """The least power of 2 at which BLAS is taken."""
    return next(1 << n for n in range(41) if through_blas(pass_, dtype, 1 << n, in_features, out_features))


def test_the_nearest_line_decides():
    lines = (
        Line("forward", "float32", 1, 256, 256, 64),
        Line("forward", "float32", 1, 4096, 4096, 1024),
        Line("forward", "float32", 8, 4096, 4096, 32),
        Line("backward", "float32", 1, 256, 256, 16),
    )
    torch.set_num_threads(1)
    with using_table(Table("four lines", lines)):
        assert _rows("forward", torch.float32, 300, 300) == 64
        assert _rows("forward", torch.float32, 4000, 3000) == 1024
        assert _rows("backward", torch.float32, 4096, 4096) == 16
        assert not through_blas("forward", torch.float64, LARGEST, 4096, 4096)
        torch.set_num_threads(8)
        assert _rows("forward", torch.float32, 4000, 3000) == 32


def test_an_empty_table_means_panels():
    with using_table(ONE):
        assert through_blas("forward", torch.float32, 512, 256, 256) and not through_blas("forward", torch.float32, 511, 256, 256)
        assert not through_blas("forward", torch.float32, 512, 0, 256) and not through_blas("backward", torch.float32, 512, 9, 9)
    with using_table(PANELS):
        assert not through_blas("forward", torch.float32, LARGEST, 4096, 4096)


@pytest.mark.parametrize("numbers", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, 1, 0)], ids=str)
def test_lines_without_sense_are_refused(numbers):
    before = products.current()
    with pytest.raises(ValueError, match="must be positive"):
        products.install(Table("none", (Line("forward", "float32", *numbers),)))
    assert products.current() == before


def test_tasks_with_few_rows_go_by_panels():
    tensors = torch.randn(600, 40), torch.arange(600) // 60, torch.randn(30, 40), torch.randn(10, 30, 40)
    lines = (Line("forward", "float32", 1, 40, 30, 512),)
    results = {}
    for rows in (60, 61):
        with using_table(Table("tasks", lines, task_rows=rows)):
            results[rows] = metamask_ext.task_masked_linear(*tensors)
    with using_table(PANELS):
        panels = metamask_ext.task_masked_linear(*tensors)
    assert torch.equal(results[61], panels) and not torch.equal(results[60], panels)
    torch.testing.assert_close(results[60], panels, rtol=1e-4, atol=1e-4)


def test_the_model_takes_blas_once_x_outgrows_the_cache():
    table = modelled_table(1 << 20)
    torch.set_num_threads(1)
    with using_table(table):
        assert _rows("backward", torch.float32, 1024, 1024) == 512
        assert _rows("backward", torch.float32, 4096, 4096) == 128
        assert _rows("backward", torch.float64, 1024, 1024) == 256
        assert _rows("forward", torch.float32, 1024, 1024) > 512
    assert table.digest != modelled_table(1 << 21).digest


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(products.as_json(ONE)))
    table = read_table(path)
    assert table.lines == ONE.lines and table.source == str(path) and table.digest == ONE.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format must be 1"),
        ({"processor": ["GenuineIntel", 6, "avx2"]}, "processor must be"),
        ({"lines": [["sideways", "float32", 1, 1, 1, 1]]}, "must begin with"),
        ({"lines": [["forward", "float16", 1, 1, 1, 1]]}, "must begin with"),
        ({"lines": [["forward", "float32", 1, 1, 1]]}, "6 entries"),
        ({"lines": [["forward", "float32", 1, 1, 1, 0.5]]}, "integers"),
        ({"lines": [["forward", "float32", 1, 1, 0, 1]]}, "integers"),
        ({"lines": 3}, "no table"),
        ({"task_rows": 0}, "integers"),
        ({"lines": [["forward", "float32", 1, 1, 1, 1]] * 10_001}, "lines must be at most 10,000, got 10,001"),
    ],
    ids=["format", "processor", "pass", "type", "short", "fraction", "zero", "no list", "task rows", "long"],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, change, says):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(products.as_json(ONE) | change))
    before = products.current()
    with pytest.raises(ValueError, match=says) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "remove it" in str(caught.value) and "metamask tune" in str(caught.value)
    assert products.current() == before


_PRINT = """
import hashlib, torch, metamask_ext
from metamask_ext import products
torch.manual_seed(0)
x, w, m = torch.randn(600, 300, requires_grad=True), torch.randn(300, 300), torch.randn(300, 300)
y = metamask_ext.masked_linear(x, w, m)
y.square().sum().backward()
bits = hashlib.sha256(y.detach().numpy().tobytes() + x.grad.numpy().tobytes()).hexdigest()
print(products.current().source, bits)
"""


def _run(path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "METAMASK_PRODUCTS": str(path)}
    return subprocess.run([sys.executable, "-c", _PRINT], env=environment, capture_output=True, text=True)


@pytest.mark.once
def test_two_processes_with_one_file_give_the_same_bits(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(products.as_json(ONE)))
    first, second = _run(path), _run(path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.split()[0] == str(path) and first.stdout == second.stdout


@pytest.mark.once
def test_a_named_file_that_is_not_there_is_an_error(tmp_path):
    ran = _run(tmp_path / "absent.json")
    assert ran.returncode != 0 and "absent.json" in ran.stderr and "METAMASK_PRODUCTS names a file that is not there" in ran.stderr


def test_the_default_is_the_machines_file_else_the_packages_table(tmp_path, monkeypatch):
    monkeypatch.delenv("METAMASK_PRODUCTS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with using_table(PANELS):
        products.install_default()
        assert products.current() == products.known_table() and products.current().lines
        path = products.machine_file()
        assert path.is_relative_to(tmp_path)
        path.parent.mkdir()
        path.write_text(json.dumps(products.as_json(ONE)))
        products.install_default()
        assert products.current().source == str(path)


def test_the_file_of_another_processor_in_a_shared_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("METAMASK_PRODUCTS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    here = products.machine_file()
    here.parent.mkdir()
    here.write_text(json.dumps(products.as_json(ONE)))
    for other in (products.processor()._replace(capability="avx"), products.Processor("../Some Vendor", 1, "default")):
        monkeypatch.setattr(products, "processor", lambda other=other: other)
        assert products.machine_file().parent == here.parent and products.machine_file() != here
        with using_table(PANELS):
            products.install_default()
            assert products.current() == products.known_table()


@pytest.mark.parametrize("hides", ["no home", "unreadable home"])
def test_where_no_folder_of_settings_can_be_found_the_packages_table_is_used(tmp_path, monkeypatch, hides):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("METAMASK_PRODUCTS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    if hides == "no home":
        monkeypatch.setattr(products.Path, "home", no_home)
    else:  # as root, who may look into any folder, a name that is too long stands for one that may not be looked into
        monkeypatch.setenv("HOME", str(tmp_path / ("x" * 300)))
    with using_table(PANELS):
        products.install_default()
        assert products.current() == products.known_table()


def test_the_model_is_made_from_the_cache_by_which_panels_are_cut(monkeypatch):
    class Compiled:
        second_level_cache = staticmethod(lambda: 3 << 20)

    assert products._compiled().second_level_cache() == _second_level_cache()
    monkeypatch.setattr(products, "processor", lambda: products.Processor("of nobody", 0, "avx2"))
    monkeypatch.setattr(products, "_compiled", lambda: Compiled)
    assert products.known_table() == modelled_table(3 << 20)


def _second_level_cache() -> int:
    """The size that the system knows, or 1 MiB where it knows none."""
    if shutil.which("getconf") is None:
        pytest.skip("there is no getconf")
    ran = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], capture_output=True, text=True)
    return int(ran.stdout.strip() or 0) or 1 << 20


def test_experiments_compute_by_panels_on_every_processor():
    before = products.current()
    with one_thread():
        assert products.current() == PANELS
    assert products.current() == before


def test_a_loop_says_when_it_goes_on_under_another_table(tmp_path):
    with using_table(ONE):
        new_loop(tmp_path).run(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new_loop(tmp_path).run(2)
    with using_table(PANELS), pytest.warns(UserWarning, match=f"table of products '{ONE.digest}'"):
        new_loop(tmp_path).run(3)


def test_tune_measures_and_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "SHAPES", ((256, 256),))
    monkeypatch.setattr(tuning, "BATCHES", (1, 2))
    path = tmp_path / "folder" / "table.json"
    ran = CliRunner().invoke(app.app, ["tune", "--out", str(path), "--threads", "1", "--dtype", "float32"])
    assert ran.exit_code == 0, ran.output
    lines, left = read_table(path).lines[:2], read_table(path).lines[2:]
    assert left == tuple(line for line in products.known_table().lines if line.dtype != "float32") and left
    assert [line[:5] for line in lines] == [("forward", "float32", 1, 256, 256), ("backward", "float32", 1, 256, 256)]
    assert all(line.rows in (1, 2, LARGEST) for line in lines) and ran.stdout.count("256 -> 256") == 2
    assert f"METAMASK_PRODUCTS={path}" in ran.stdout


def test_tune_finds_where_blas_begins_to_win(monkeypatch):
    monkeypatch.setattr(tuning, "_ratio", lambda pass_, dtype, batch, *sizes: 2.0 if batch < 512 else 0.5)
    assert tuning._least_rows("forward", torch.float32, 1024, 1024) == (512, 0.5)
    monkeypatch.setattr(tuning, "_ratio", lambda *of: 1.5)
    assert tuning._least_rows("forward", torch.float32, 1024, 1024)[0] == LARGEST
    monkeypatch.setattr(tuning, "_ratio", lambda *of: 0.5)
    assert tuning._least_rows("forward", torch.float32, 1024, 1024) == (tuning.BATCHES[0], 0.5)


def test_tune_refuses_an_unknown_type():
    ran = CliRunner().invoke(app.app, ["tune", "--dtype", "float16"])
    assert ran.exit_code == 2 and "--dtype must be one of float64, float32" in ran.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--out", "{}"], 1, "it is a folder"),
        (["--out", "{}/file/table.json"], 1, "must be a folder that can be written"),
        (["--threads", "100000000000"], 2, "--threads must be at most"),
    ],
    ids=["a folder", "in a file", "threads"],
)
def test_tune_refuses_what_it_cannot_do_before_it_measures(tmp_path, monkeypatch, options, code, says):
    monkeypatch.setattr(app, "tune", lambda *of: pytest.fail("it measured"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "file").touch()
    ran = CliRunner().invoke(app.app, ["tune", *(option.format(tmp_path) for option in options)])
    assert ran.exit_code == code and says in ran.stderr, ran.output
