"""The settings of a run: the experiment's, and what ``--quick``, a TOML file and single options change in them.

Settings are frozen dataclasses. Their fields are numbers, strings, booleans, tuples, tables with fixed keys (further frozen
dataclasses) and tables whose keys are the default's (mappings). The default says which type each setting has.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from metamask_ext.files.read import MAX_BYTES, read_file

from .claims import Metrics
from .jobs import Json, flat

Value = bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"]
"""A value of TOML."""
Changes = Mapping[str, Value]
"""Some settings of an experiment by name, tables within tables, with other values."""
S = TypeVar("S")


@dataclass(frozen=True)
class RunSettings:
    """The settings of every experiment, which extends this class by its own.

    Attributes:
        seeds: the number of seeds, over which the experiment is repeated.
    """

    seeds: int = 5


class OptionError(ValueError):
    """A setting that the experiment does not have, or a value that it cannot take. Nothing was written."""


def resolve(experiment: str, settings: S, *changes: Mapping[str, object]) -> S:
    """``settings`` with each of ``changes`` merged into it in turn, tables within tables.

    A value must be of the type that it replaces; an int will do for a float, and becomes one. Items of a tuple, lists in TOML, must
    be of the type of the items that it had; tables in a list have the keys of the tables that were there.

    Args:
        experiment: named by errors.
        settings: all settings of the experiment, with the values that they have if nothing is changed.
        changes: some of them, with other values.

    Raises:
        OptionError: an unknown setting (the message has the nearest known one), or a value of another type.
    """
    resolver = _Resolver(experiment, list(_paths(settings)))
    for change in changes:
        settings = resolver.merged(settings, change, "")
    return settings


def as_json(settings: object) -> Json:
    """Settings as a JSON object, which :func:`resolve` takes back."""
    return {name: _plain(value) for name, value in _entries(settings).items()}


def of_run(default: S, metrics: Metrics) -> S:
    """The settings in a run's metrics, of the type of ``default``. KeyError if they lack one."""
    found = resolve(metrics["experiment"], default, metrics["settings"])
    missing = flat(as_json(found)).keys() - flat(metrics["settings"]).keys()
    if missing:
        raise KeyError(min(missing))
    return found


def read_toml(path: Path) -> Json:
    """The settings in a TOML file. OptionError if it cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError('tomli is not installed: pip install "metamask_ext[experiments]"') from error
    try:
        return tomllib.loads(read_file(path, MAX_BYTES).decode())
    except OSError as error:
        raise OptionError(f"config must be a TOML file, cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of too many digits; nested too deeply
        raise OptionError(f"config must be a TOML file, got {str(path)!r}: {error}") from error


def to_toml(settings: Mapping[str, object]) -> str:
    """The text of a TOML file that :func:`read_toml` reads back unchanged."""
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError('tomli_w is not installed: pip install "metamask_ext[experiments]"') from error
    return tomli_w.dumps(settings)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or is_dataclass(value)


def _entries(table: object) -> Mapping[str, object]:
    if isinstance(table, Mapping):
        return table
    assert is_dataclass(table)
    return {field.name: getattr(table, field.name) for field in fields(table)}


def _plain(value: object) -> object:
    if _is_table(value):
        return as_json(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _paths(table: object, prefix: str = "") -> Iterator[str]:
    """The names of all settings, ``study.lr`` for one within a table, tables included."""
    for key, value in _entries(table).items():
        yield f"{prefix}{key}"
        if _is_table(value):
            yield from _paths(value, f"{prefix}{key}.")


@dataclass(frozen=True)
class _Resolver:
    """Merges changes into settings; ``known``: the names of all of them."""

    experiment: str
    known: list[str]

    def merged(self, table: Any, changes: Mapping[str, object], prefix: str) -> Any:
        """``table`` with ``changes``, some of its entries."""
        entries, changed = _entries(table), {}
        for key, value in changes.items():
            name = f"{prefix}{key}"
            if key not in entries:
                # The setting that was meant is at the end of what was written: 'studdy.lr', not 'studdy'.
                wrong = next((path for path in _paths({key: value}, prefix) if "." in path.removeprefix(prefix)), name)
                (nearest,) = difflib.get_close_matches(wrong, self.known, n=1, cutoff=0.0)
                raise self._error(f"unknown setting {wrong!r}, did you mean {nearest!r}?")
            if not _is_table(entries[key]):
                changed[key] = self._fitted(entries[key], value, name)
            elif isinstance(value, Mapping):
                changed[key] = self.merged(entries[key], value, f"{name}.")
            else:
                raise self._error(f"{name!r} must be a table, got {_kind(value)}: {value!r}")
        return {**table, **changed} if isinstance(table, Mapping) else replace(table, **changed)

    def _fitted(self, was: object, value: object, name: str) -> object:
        """``value`` in the place of ``was``, a number, a string, a tuple, or a table in one."""
        if isinstance(was, float) and type(value) is int:
            return float(value)
        if isinstance(was, tuple) and isinstance(value, (list, tuple)):
            return tuple(self._fitted(_like(was, item), item, f"{name}[{index}]") for index, item in enumerate(value))
        if _is_table(was) and isinstance(value, Mapping):
            return self._whole(was, value, name)
        if type(was) is not type(value):
            raise self._error(f"{name!r} must be {_kind(was)}, got {_kind(value)}: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"{name!r} must be finite, got {value}")
        return value

    def _whole(self, was: Any, value: Mapping[str, object], name: str) -> object:
        """A table in a list: of the class of ``was``, with the entries of ``value``."""
        entries = _entries(was)
        for key in value:
            if key not in entries:
                raise self._error(f"unknown setting '{name}.{key}', known are: {', '.join(entries)}")
        for field in fields(was):
            if field.name not in value and field.default is MISSING:
                raise self._error(f"'{name}' must have {field.name!r}, got {dict(value)}")
        return type(was)(**{key: self._fitted(entries[key], item, f"{name}.{key}") for key, item in value.items()})

    def _error(self, message: str) -> OptionError:
        return OptionError(f"experiment {self.experiment!r}: {message}")


def _like(items: tuple[object, ...], new: object) -> object:
    """An item that stands for the types of all: a float if one is; a ``new`` one where there are none."""
    return next((item for item in items if isinstance(item, float)), items[0] if items else new)


def _kind(value: object) -> str:
    if _is_table(value):
        return "a table"
    kinds = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", tuple: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")
