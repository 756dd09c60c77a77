"""The settings of a run: the module's, and what ``--quick``, a TOML file and single options change in them."""

from __future__ import annotations

import copy
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class OptionError(ValueError):
    """A setting that the experiment does not have, or a value that it cannot take. Nothing was written."""


def resolve(experiment: str, settings: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with each of ``changes`` merged into it in turn, tables within tables.

    A value must be of the type that it replaces; an int will do for a float, and becomes one. Items of a list must be of the type
    of the items that it had, tables in a list have the keys of the tables that were there.

    Args:
        experiment: named by errors.
        settings: all settings of the experiment, with the values that they have if nothing is changed.
        changes: some of them, with other values.

    Raises:
        OptionError: an unknown setting (the message has the nearest known one), or a value of another type.
    """
    merged = json.loads(json.dumps(dict(settings)))
    for change in changes:
        _merge(merged, change, "", experiment, list(paths(settings)))
    return merged


def paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all settings, ``study.lr`` for one within a table, tables included."""
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from paths(value, f"{prefix}{key}.")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, ``settings.lr``, so that a message can name one."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name in value for key, item in flat(value[name], f"{prefix}.{name}" if prefix else name).items()}


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. OptionError if it cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError('tomli is not installed: pip install "metamask_ext[experiments]"') from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"config must be a TOML file, cannot read {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"config must be a TOML file, {str(path)!r} is none: {error}") from error


def to_toml(settings: Mapping[str, Any]) -> str:
    """What :func:`read_toml` reads back unchanged."""
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError('tomli_w is not installed: pip install "metamask_ext[experiments]"') from error
    return tomli_w.dumps(settings)


def _merge(settings: dict[str, Any], changes: Mapping[str, Any], prefix: str, experiment: str, known: list[str]) -> None:
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in settings:
            # The setting that was meant is at the end of what was written: 'studdy.lr', not 'studdy'.
            wrong = next((path for path in paths({key: value}, prefix) if "." in path.removeprefix(prefix)), name)
            (nearest,) = difflib.get_close_matches(wrong, known, n=1, cutoff=0.0)
            raise OptionError(f"experiment {experiment!r}: unknown setting {wrong!r}, did you mean {nearest!r}?")
        if isinstance(settings[key], dict):
            if not isinstance(value, Mapping):
                raise OptionError(f"experiment {experiment!r}: {name!r} must be a table, got {_kind(value)}: {value!r}")
            _merge(settings[key], value, f"{name}.", experiment, known)
        else:
            settings[key] = _fitted(settings[key], value, name, experiment)


def _fitted(was: Any, value: Any, name: str, experiment: str) -> Any:
    """``value`` in the place of ``was``."""
    if isinstance(was, float) and type(value) is int:
        return float(value)
    if isinstance(was, list) and isinstance(value, (list, tuple)):
        return [_fitted(_like(was), item, f"{name}[{index}]", experiment) if was else item for index, item in enumerate(value)]
    if isinstance(was, dict) and isinstance(value, Mapping):
        for key in value:
            if key not in was:
                raise OptionError(f"experiment {experiment!r}: unknown setting '{name}.{key}', known are: {', '.join(was)}")
        return {key: _fitted(was[key], item, f"{name}.{key}", experiment) for key, item in value.items()}
    if type(was) is not type(value):
        raise OptionError(f"experiment {experiment!r}: {name!r} must be {_kind(was)}, got {_kind(value)}: {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"experiment {experiment!r}: {name!r} must be finite, got {value}")
    return copy.deepcopy(value)


def _like(items: list[Any]) -> Any:
    """What an item of a list looks like: of numbers a float if there is one, of tables one with the keys of all."""
    if all(isinstance(item, dict) for item in items):
        return {key: value for item in items for key, value in item.items()}
    return next((item for item in items if isinstance(item, float)), items[0])


def _kind(value: Any) -> str:
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        dict: "a table",
        list: "a list",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
