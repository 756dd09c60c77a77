"""Settings as a command line gives them: ``study.lr=0.01,0.03``, names with one value or several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .jobs import Json
from .settings import OptionError, Value, as_json, entries, is_table, kind, resolve


def assigned(experiment: str, settings: object, texts: Iterable[str]) -> dict[str, list[Value]]:
    """The values of settings by name, each of the type that the setting has.

    Args:
        experiment: named by errors.
        settings: all settings of the experiment, a dataclass: they say which there are, and of which types.
        texts: ``name=value`` or ``name=value,value``. A name within a table has dots. Text is taken as it is, or as JSON between
            quotes; a list, or a table in one, is JSON: ``study.new.samples=[1,10],[1,100]`` are two values.

    Raises:
        OptionError: a text is no assignment, its name is unknown (the message has the nearest known one) or that of a table, a
            value is of another type, or a name or a value comes twice.
    """
    found: dict[str, list[Value]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise OptionError(f"experiment {experiment!r}: a setting must be given as name=value, got {text!r}")
        if name in found:
            raise OptionError(f"experiment {experiment!r}: {name!r} is set twice")
        was = _value(experiment, settings, name)
        of_name: list[Value] = []
        for part in _parts(values):
            value = _plain_at(resolve(experiment, settings, nested(name, _parsed(experiment, was, part, name))), name)
            if value in of_name:
                raise OptionError(f"experiment {experiment!r}: {name!r} has the value {text_of(value)} twice")
            of_name.append(value)
        found[name] = of_name
    return found


def nested(name: str, value: Value) -> dict[str, Value]:
    """``{"study": {"lr": value}}`` for ``study.lr``."""
    first, dot, rest = name.partition(".")
    return {first: nested(rest, value) if dot else value}


def merged(changes: Iterable[Mapping[str, Any]]) -> Json:
    """Changes of settings as one, tables within tables; those that come later win."""
    made: Json = {}
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
            made[key] = merged([made[key], value]) if both else value
    return made


def text_of(value: Value) -> str:
    """A value as :func:`assigned` takes it: text as it is, where it can be, and anything else as JSON."""
    as_it_is = isinstance(value, str) and value.isprintable() and not set(value) & set(',[]{}"') and value == value.strip()
    return str(value) if as_it_is else json.dumps(value, separators=(",", ":"))


def _value(experiment: str, settings: object, name: str) -> object:
    """The value that a setting has."""
    table = settings
    for key in name.split("."):
        if not is_table(table) or key not in entries(table):
            resolve(experiment, settings, nested(name, 0))  # which says what it could have been
            raise OptionError(f"experiment {experiment!r}: unknown setting {name!r}")
        table = entries(table)[key]
    if is_table(table):
        known = ", ".join(f"{name}.{key}" for key in entries(table))
        raise OptionError(f"experiment {experiment!r}: {name!r} is a table, set one of its entries: {known}")
    return table


def _plain_at(settings: object, name: str) -> Value:
    value: Any = as_json(settings)
    for key in name.split("."):
        value = value[key]
    plain: Value = value
    return plain


def _parts(text: str) -> list[str]:
    """The parts between the commas that are in no brackets and in no quotes."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for letter in text:
        if letter == "," and depth == 0 and not quoted:
            parts.append("")
            continue
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "[{") - (letter in "]}")
        parts[-1] += letter
    return [part.strip() for part in parts]


def _parsed(experiment: str, was: object, text: str, name: str) -> Value:
    """The value that ``text`` stands for, in the place of ``was``."""
    try:
        if isinstance(was, bool):
            return {"true": True, "false": False}[text]
        if isinstance(was, (int, float)):
            return type(was)(text)
        if isinstance(was, str) and not text.startswith('"'):
            return text
        value: Value = json.loads(text)
    except (KeyError, ValueError, RecursionError):
        wanted = {bool: "true or false", tuple: "a list as JSON, such as [1, 2]"}.get(type(was), kind(was))
        raise OptionError(f"experiment {experiment!r}: {name!r} must be {wanted}, got {text!r}") from None
    return value
