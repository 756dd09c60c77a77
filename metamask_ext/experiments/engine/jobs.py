"""Jobs: the parts that the work of a run is cut into, their names, and the JSON that they return."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metamask_ext.files.errors import OutputError

Key = tuple[int, str]
"""The seed and the name of a job."""
Job = Callable[[], Mapping[str, object]]
"""Computes a JSON object. Jobs for several processes must be picklable: :func:`functools.partial` of a module's function, say."""
Json = dict[str, Any]
"""A JSON object as it is read back from a file."""


class JobError(RuntimeError):
    """A job raised an error, or its process died; the message has the job's name and the error."""


def described(key: Key) -> str:
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


def read_json(path: Path) -> Json:
    """The object in a JSON file. OutputError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {str(path)!r}: {error}") from error


def flat(value: object, prefix: str = "") -> Json:
    """A nested JSON object as one level, ``settings.lr``, so that a message can name one entry."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name in value for key, item in flat(value[name], f"{prefix}.{name}" if prefix else name).items()}
