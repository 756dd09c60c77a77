"""The wheels for a machine with a GPU: their size, and the command that uses them there."""

from __future__ import annotations

import gpu_wheel
import pytest


def test_wheels_are_no_larger_than_can_be_carried(tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds no wheel"):
        gpu_wheel.check_size(tmp_path)
    (tmp_path / "one.whl").write_bytes(bytes(3 << 20))
    (tmp_path / "two.whl").write_bytes(bytes(1 << 20))
    assert gpu_wheel.check_size(tmp_path) == 4 << 20
    assert "3.0 MiB  one.whl" in capsys.readouterr().out
    assert gpu_wheel.check_size(tmp_path, 4 << 20) == 4 << 20
    with pytest.raises(SystemExit, match=r"the wheels are 4.0 MiB together, more than the 3 MiB that can be carried"):
        gpu_wheel.check_size(tmp_path, 3 << 20)
    assert gpu_wheel.LIMIT == 64 << 20


def test_the_command_is_one_that_needs_no_network():
    command = gpu_wheel.command(gpu_wheel.BUDGET)
    assert len(command) <= 2000 and "\n" not in command
    for part in ("--no-index --no-deps", ".gpu/wheels/*.whl", "PYTHONSAFEPATH=1", 'tools/gpu_stages.py --out "$OUT" --budget 700'):
        assert part in command


def test_an_interpreter_of_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_wheel, "PYTHON", (3, 99))
    monkeypatch.setenv("PYTHON312", "python3")
    with pytest.raises(SystemExit, match=r"no Python 3.99 was found: set PYTHON312 to one"):
        gpu_wheel.find_python()
