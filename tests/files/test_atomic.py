"""Writing: nothing goes through a link, no name can be prepared, and the first error is the one that is raised."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metamask_ext.files import atomic
from metamask_ext.files.atomic import output_errors, sweep, sync, write_atomic, write_new
from metamask_ext.files.errors import OutputError


def failing(function: Callable[..., object], number: int, when: Callable[..., bool] = lambda *given: True):
    def call(*given: object, **options: object) -> object:
        if when(*given):
            raise OSError(number, os.strerror(number))
        return function(*given, **options)

    return call


class TestLinks:
    @pytest.mark.parametrize("name", ["file", "file.tmp", "file.0123456789abcdef.tmp"])
    def test_what_a_link_leads_to_stays(self, tmp_path, name, monkeypatch):
        monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "fedcba9876543210")
        (tmp_path / "victim").write_text("precious")
        (tmp_path / name).symlink_to(tmp_path / "victim")
        write_atomic(tmp_path / "file", b"new")
        assert (tmp_path / "victim").read_text() == "precious"
        assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()

    @pytest.mark.parametrize(
        "make", [lambda path: path.symlink_to("/dev/null"), os.mkfifo, Path.touch], ids=["link", "pipe", "file"]
    )
    def test_a_temporary_name_that_is_taken(self, tmp_path, make, monkeypatch):
        """Were it guessed, the write would be refused, and what is there stays."""
        monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "fedcba9876543210")
        taken = tmp_path / "file.fedcba9876543210.tmp"
        make(taken)
        before = taken.lstat()
        with pytest.raises(OutputError, match="cannot write .*file'.*File exists"):
            write_atomic(tmp_path / "file", b"new")
        assert (taken.lstat().st_ino, taken.lstat().st_mode) == (before.st_ino, before.st_mode)
        assert not (tmp_path / "file").exists()

    def test_a_pipe_in_the_place_of_the_file_is_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "file")
        write_atomic(tmp_path / "file", b"a", memoryview(b"bc"))
        assert (tmp_path / "file").read_bytes() == b"abc"

    def test_new_files_replace_nothing(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError):
            write_new(tmp_path / "link", b"x")
        assert not (tmp_path / "nowhere").exists()


class TestErrors:
    @pytest.mark.parametrize("name", ["write", "fsync", "close", "replace", "open"])
    def test_the_first_error_is_kept(self, tmp_path, monkeypatch, name):
        """A disk that fails for good fails in the clean-up too."""
        write_atomic(tmp_path / "file", b"old")
        monkeypatch.setattr(os, name, failing(getattr(os, name), errno.EIO))
        monkeypatch.setattr(os, "unlink", failing(os.unlink, errno.EROFS))
        monkeypatch.setattr(Path, "unlink", failing(Path.unlink, errno.EROFS))
        with pytest.raises(OutputError, match="cannot write .*file': Input/output error"):
            write_atomic(tmp_path / "file", b"new")
        monkeypatch.undo()
        assert (tmp_path / "file").read_bytes() == b"old"

    @pytest.mark.parametrize("name", ["write", "fsync", "replace"])
    def test_nothing_is_left(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr(os, name, failing(getattr(os, name), errno.ENOSPC))
        with pytest.raises(OutputError):
            write_atomic(tmp_path / "file", b"new")
        assert list(tmp_path.iterdir()) == []

    def test_a_short_write_is_continued(self, tmp_path, monkeypatch):
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        write_atomic(tmp_path / "file", b"0123456789", b"", b"ab")
        assert (tmp_path / "file").read_bytes() == b"0123456789ab"

    def test_a_write_that_leaves_more_than_it_says(self, tmp_path, monkeypatch):
        """As one may that was interrupted and is tried again."""
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]) * 0 + write(descriptor, data))
        with pytest.raises(OutputError, match="cannot write .*file': 5 bytes are there, and 3 were written"):
            write_atomic(tmp_path / "file", b"abc")
        assert list(tmp_path.iterdir()) == []

    def test_errors_of_writes_name_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "write", failing(os.write, errno.ENOSPC))
        with pytest.raises(OSError, match="No space left on device: .*/file"):
            write_new(tmp_path / "file", b"x")
        with pytest.raises(OutputError, match="cannot read 'x': Is a directory"), output_errors(Path("x"), "read"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP], ids=errno.errorcode.get)
    def test_a_file_system_that_cannot_sync(self, tmp_path, monkeypatch, number):
        monkeypatch.setattr(os, "fsync", failing(os.fsync, number))
        write_atomic(tmp_path / "file", b"new")
        sync(tmp_path)
        assert (tmp_path / "file").read_bytes() == b"new"


def test_long_names(tmp_path):
    for name in ("x" * 255, "x" * 240, "ä" * 127):
        write_atomic(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


def test_sweeping_removes_what_killed_writers_left_and_no_more(tmp_path):
    ours = ["a.json.tmp", "a.json.0123456789abcdef.tmp"]
    theirs = ["a.json", "b.json.tmp", "a.json.0123.tmp", "a.json.0123456789abcdef", "tmp", ".tmp", "a.json.tmp.bak"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.json.fedcba9876543210.tmp").symlink_to(tmp_path / "victim")
    sweep(tmp_path, lambda name: name == "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "victim"])
    assert (tmp_path / "victim").read_text() == "precious"
