"""Reading of what others may have made: no pipe is waited for, and no JSON is too large or too deep to be refused at once."""

from __future__ import annotations

import json
import os

import pytest

from metamask_ext.files.errors import CheckpointError, OutputError
from metamask_ext.files.metrics import MetricsFile, read_metrics
from metamask_ext.files.read import MAX_DEPTH, check_depth, parse_json, read_file, read_json


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (nested(100_000), "within more than 100 others"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "within more than 100 others"),
        (nested(MAX_DEPTH + 2), "within more than 100 others"),
        (b"[" + b"null," * 4_000_001 + b"null]", "about 4,000,002 values"),
        (b"[" + b" " * (1 << 26) + b"]", "67,108,866 bytes"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"1e999", "too large a number"),
        (b"9" * 5000, "4300"),
        (b"\xff", "decode"),
        ('"ä"'.encode("utf-16"), "decode"),
        (b"", "Expecting value"),
        (b"{}x", "Extra data"),
    ],
    ids=[
        "lists",
        "objects",
        "just too deep",
        "nulls",
        "bytes",
        "nan",
        "infinity",
        "1e999",
        "digits",
        "bytes",
        "utf-16",
        "empty",
        "more",
    ],
)
def test_refused_json(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_json_that_is_read():
    value = {"a": [1, -0.0, 1e-300, True, None, {"b": "[[[" * 200}], "\ud800": 2**70}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert len(parse_json(b"[" + b"[]," * 1000 + b"[]]")) == 1001


def test_containers_that_hold_themselves():
    ring: list[object] = []
    ring += [ring, {"a": ring}]
    with pytest.raises(ValueError, match="within more than 100 others"):
        check_depth(ring)
    check_depth({"a": [1, (2, {3})]})


def test_files_that_are_none(tmp_path):
    (tmp_path / "file").write_bytes(b"[1]")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link") == b"[1]" and read_json(tmp_path / "file") == [1]
    with pytest.raises(OSError, match="3 bytes are more than such a file has, at most 2: .*file"):
        read_file(tmp_path / "file", 2)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(tmp_path / name)


class TestMetrics:
    def test_a_line_that_is_none(self, tmp_path):
        for text, message in (
            ("{}\n3\n", "line 2: it must be a JSON object, got int"),
            ("{", "line 1: "),
            ("[" * 1000, "line 1: .*others"),
            ("\n", "line 1"),
        ):
            (tmp_path / "metrics.jsonl").write_text(text)
            with pytest.raises(OutputError, match=rf"cannot read .*metrics\.jsonl': {message}"):
                read_metrics(tmp_path)

    def test_links_pipes_and_other_contents(self, tmp_path):
        path, victim = tmp_path / "metrics.jsonl", tmp_path / "victim"
        victim.write_text("precious")
        path.symlink_to(victim)
        with pytest.raises(OutputError, match="cannot write"):
            MetricsFile(path, 0)
        path.unlink()
        os.mkfifo(path)
        for use in (lambda: MetricsFile(path, 0), lambda: read_metrics(tmp_path)):
            with pytest.raises(OutputError, match="not a regular file"):
                use()
        path.unlink()
        with MetricsFile(path, 0) as metrics:
            metrics.write({"a": 1})
            length, sha256 = metrics.sync(), metrics.sha256
            metrics.write({"a": 2})
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match="was changed since"):
            MetricsFile(path, length, "0" * 64)
        assert path.read_bytes() == before and victim.read_text() == "precious"
        with MetricsFile(path, length, sha256) as metrics:
            assert path.read_bytes() == before, "nothing is cut off before the checkpoint is taken over"
            metrics.cut()
        assert path.read_bytes() == b'{"a": 1}\n'

    def test_the_error_of_the_block_is_kept(self, tmp_path):
        with pytest.raises(ZeroDivisionError), MetricsFile(tmp_path / "metrics.jsonl", 0) as metrics:
            metrics.write({"a": 1})
            os.close(metrics._file.fileno())
            raise ZeroDivisionError
