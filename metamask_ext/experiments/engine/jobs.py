"""Jobs: the parts that the work of a run is cut into, their names, and the JSON that they return."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metamask_ext.files import read
from metamask_ext.files.errors import OutputError

CHECKSUM = "sha256"
"""The entry of a JSON object that holds its checksum."""

Key = tuple[int, str]
"""The seed and the name of a job."""
Job = Callable[[], Mapping[str, object]]
"""Computes a JSON object. Jobs for several processes must be picklable: :func:`functools.partial` of a module's function, say."""
Json = dict[str, Any]
"""A JSON object as it is read back from a file."""


class JobError(RuntimeError):
    """A job raised an error, or its process died; the message has the job's name and the error."""


def named(key: Key) -> str:
    """The job in a message."""
    return f"job {key[1]!r} of seed {key[0]}"


def file_name(job: str) -> str:
    """The name of a job's files, without a suffix. ValueError if it cannot be one."""
    if not job or "/" in job or job.startswith("."):
        raise ValueError(f"the name of a job must be a file name, got {job!r}")
    return job.replace(", ", "-").replace(" ", "-")


def json_bytes(value: object) -> bytes:
    """``value`` as a JSON file. ValueError if a number in it is not finite."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def checked_bytes(value: Mapping[str, object]) -> bytes:
    """``value`` as a JSON file with a checksum, its first entry: the SHA-256 of what :func:`json_bytes` makes of the others.

    Another layout of the file has the same checksum; another value, or order of entries, has not.
    """
    if CHECKSUM in value:
        raise ValueError(f"an object with the entry {CHECKSUM!r} cannot be given one")
    return json_bytes({CHECKSUM: hashlib.sha256(json_bytes(value)).hexdigest(), **value})


def read_json(path: Path) -> Json:
    """The object in a JSON file. OutputError if it cannot be read, is no object, or was changed since it got a checksum."""
    try:
        value = read.read_json(path)
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(value, dict):
        raise OutputError(f"cannot read {str(path)!r}: it must hold a JSON object, got {type(value).__name__}")
    if CHECKSUM in value and value[CHECKSUM] != hashlib.sha256(json_bytes(without_checksum(value))).hexdigest():
        raise OutputError(f"{str(path)!r} was changed since it was written: its checksum is that of other contents. Delete it")
    return value


def read_results(path: Path) -> Json:
    """The object in a JSON file of results, with its checksum. One without, of an earlier version, is taken with a warning."""
    value = read_json(path)
    if CHECKSUM not in value:
        warnings.warn(f"{str(path)!r} has no checksum, as of earlier versions: it is taken as it is", stacklevel=2)
    return value


def without_checksum(value: Json) -> Json:
    """``value`` as it was before it got a checksum."""
    return {key: item for key, item in value.items() if key != CHECKSUM}


def flat(value: object, prefix: str = "") -> Json:
    """A nested JSON object as one level, ``settings.lr``, so that a message can name one entry."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name in value for key, item in flat(value[name], f"{prefix}.{name}" if prefix else name).items()}
