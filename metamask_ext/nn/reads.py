"""Finds whose ``weight`` and ``bias`` a module reads past the forward of the layer that owns them, from its bytecode."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType

from torch import nn

from .guarded import METADATA


def forget() -> None:
    """Forget what was found: a method may have been replaced since."""
    _owners_read.cache_clear()


def is_read(model: nn.Module, name: str) -> bool:
    """True if a module around the layer ``name`` reads its weight or bias itself, as in ``F.linear(x, self.fc.weight)``."""
    *outer, own = name.split(".")
    around = [model] if name else []
    for part in outer:
        around.append(around[-1].get_submodule(part))
    return any(own in read or None in read for read in map(_layers_read, around))


def _layers_read(module: nn.Module) -> set[str | None]:
    """The names ``f`` in every ``….f.weight`` and ``….f.bias`` that ``forward``, or what it calls, reads; None: of no known name.

    Of other methods (``training_step``, a loss), only names that are known, and none where a method sets up or saves the module.
    """
    bases = type(module).__mro__
    function = inspect.unwrap(module.forward)
    found = set(_owners_read(getattr(function, "__func__", function), bases))
    for base in bases:
        if base.__module__.partition(".")[0] == "torch":
            continue  # torch's own modules compute in forward
        for name in vars(base):
            if not _SETS_UP.match(name):
                for method in _methods(base.__mro__, name):
                    found |= _owners_read(method, bases) - {None}
    return found


_SETS_UP = re.compile(
    r"__|_?(init|reset|tie|untie|resize|load|save|from_|configure|extra_repr|prune|freeze|unfreeze|(get|set)_\w*(embedding|param|group))"
)
"""Methods that handle parameters as such: they mean the shared ones."""

_INITIALISES = re.compile(r"_?(init|initiali[sz]e|reset)_(weights|parameters)")
"""Those that no forward means by a name: transformers' models reach theirs by way of ``to``."""


@functools.cache
def _owners_read(forward: object, bases: tuple[type, ...]) -> set[str | None]:
    found: set[str | None] = set()
    seen: set[CodeType] = set()
    # A function, and whether its first argument is the module, whose own weight is not a layer's.
    todo: list[tuple[object, bool]] = [(forward, True)]
    while todo:
        function, is_method = todo.pop()
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        code = function.__code__
        seen.add(code)
        module_itself = code.co_varnames[0] if is_method and code.co_argcount else None
        for before, instruction, following in _instructions(code):
            owner = before[-1]
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL":
                called = function.__globals__.get(name)
                if inspect.isfunction(called) and _package(called) == _package(function):
                    todo.append((inspect.unwrap(called), False))
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if not _INITIALISES.fullmatch(name):
                    todo += [(called, True) for called in _methods(bases, name)]
                if name not in ("weight", "bias") or _reads_no_value(following) or _asks_for_type(before, following):
                    continue
                if owner.opname == "LOAD_ATTR":
                    found.add(owner.argval)
                elif not owner.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME")) and _last(owner.argval) != module_itself:
                    found.add(None)
    return found


def misses_attribute(kind: type[nn.Module], name: str = "weight") -> str | None:
    """The reason why a module's forward would miss what is put in the place of its parameter ``name``; None if it reads that.

    It may take the parameter from ``_parameters``, ``state_dict()`` or the like, or use another attribute. torch's own code takes
    parameters by their names alone.
    """
    found = False
    seen: set[CodeType] = set()
    todo: list[object] = [inspect.unwrap(getattr(kind, method)) for method in ("forward", "_conv_forward") if hasattr(kind, method)]
    while todo:
        function = todo.pop()
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        code = function.__code__
        seen.add(code)
        of_torch = _package(function) == "torch"
        todo += [cell.cell_contents for cell in function.__closure__ or () if _is_function(cell)]
        module_itself = code.co_varnames[0] if code.co_varnames else None
        for before, instruction, following in _instructions(code):
            if not of_torch and (source := _takes_parameters(before[-1], instruction, following, name)):
                return f"its forward takes parameters from {source}, not from its attributes"
            # A layer that is given to other code may be read there.
            given = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and _last(instruction.argval) == module_itself
            given = given and not of_torch and not following[0].opname.endswith(_OF_OBJECT)
            found = found or instruction.argval == name or given
            todo += _methods(kind.__mro__, instruction.argval) if of_torch else _called(function, kind, before[-1], instruction)
    return None if found else f"its forward does not read its attribute {name}"


_OF_OBJECT = ("_ATTR", "_METHOD")

_PARAMETERS = frozenset(("_parameters", "parameters", "named_parameters", "get_parameter", "state_dict", "__dict__", "__getattr__"))
"""Attributes that give the parameters of a module past those of their names."""


def _is_function(cell: CellType) -> bool:
    try:
        return inspect.isfunction(cell.cell_contents)
    except ValueError:  # it is empty
        return False


def _called(function: FunctionType, kind: type[nn.Module], owner: dis.Instruction, instruction: dis.Instruction) -> list[object]:
    """The functions that an instruction of ``function`` loads: methods of ``kind``, and functions of the same package."""
    name = instruction.argval
    if instruction.opname.startswith("LOAD_") and instruction.opname.endswith(_OF_OBJECT):
        called = _methods(kind.__mro__, name)
        module = function.__globals__.get(owner.argval) if owner.opname == "LOAD_GLOBAL" else None
        others = [getattr(module, name, None)] if inspect.ismodule(module) else []
    else:
        called, others = [], [function.__globals__.get(name)] if instruction.opname == "LOAD_GLOBAL" else []
    return called + [inspect.unwrap(f) for f in others if inspect.isfunction(f) and _package(f) == _package(function)]


def _takes_parameters(owner: dis.Instruction, instruction: dis.Instruction, following: Instructions, parameter: str) -> str | None:
    """The name of what an instruction takes parameters from, of a module and no part of it; None if it is for another purpose."""
    name = instruction.argval
    if instruction.opname == "LOAD_GLOBAL" and name == "vars":
        following = following[1:]
    elif instruction.opname.startswith("LOAD_") and instruction.opname.endswith(_OF_OBJECT):
        if name not in _PARAMETERS or (owner.opname == "LOAD_ATTR" and name != "__getattr__"):
            return None
    elif instruction.opname != "LOAD_CONST" or name != "_parameters":
        return None
    rest = list(following)
    while rest and (rest[0].opname in ("PRECALL", "CALL", "PUSH_NULL") or rest[0].argval == "get"):
        rest.pop(0)
    if rest and rest[0].opname == "LOAD_CONST" and isinstance(rest[0].argval, str):
        if rest[0].argval not in ("weight", "bias", parameter, *_PARAMETERS):
            return None
        rest = [after for after in rest[1:] if after.opname not in ("BINARY_SUBSCR", "PRECALL", "CALL")]
    return None if rest and _reads_no_value(rest) else str(name)


Instructions = list[dis.Instruction]


def _instructions(code: CodeType) -> Iterator[tuple[Instructions, dis.Instruction, Instructions]]:
    """Each instruction with some before it and some after it; also those of the comprehensions and lambdas inside."""
    found = [instruction for instruction in dis.get_instructions(code) if instruction.opname not in ("CACHE", "EXTENDED_ARG")]
    for index in range(1, len(found)):
        yield found[max(0, index - 6) : index], found[index], found[index + 1 : index + 7]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def _reads_no_value(following: Instructions) -> bool:
    """True if what comes after ``.weight`` is ``.dtype`` or the like, ``.data.dtype``, or a comparison with None."""
    while following and following[0].opname == "LOAD_ATTR" and following[0].argval == "data":
        following = following[1:]
    if not following:
        return False
    first = following[0]
    if first.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return first.argval in METADATA
    if first.opname == "LOAD_CONST" and first.argval is None:
        return len(following) > 1 and following[1].opname == "IS_OP"
    return first.opname.endswith(("_IF_NONE", "_IF_NOT_NONE"))


def _asks_for_type(before: Instructions, following: Instructions) -> bool:
    """True in ``isinstance(self.….weight, …)``."""
    rest = list(before)
    while rest and rest[-1].opname == "LOAD_ATTR":
        rest.pop()
    called = [instruction.argval for instruction in rest[-2:-1] if instruction.opname == "LOAD_GLOBAL"]
    if called != ["isinstance"] or rest[-1].opname not in ("LOAD_FAST", "LOAD_DEREF"):
        return False
    other = next((instruction.opname for instruction in following if not instruction.opname.startswith("LOAD_")), "")
    return following[0].opname.startswith("LOAD_") and other.startswith(("BUILD_TUPLE", "PRECALL", "CALL"))


def _methods(bases: tuple[type, ...], name: str) -> list[object]:
    """The functions behind ``self.<name>`` and ``super().<name>``."""
    found: list[object] = []
    for base in bases:
        member = None if base in (nn.Module, object) else base.__dict__.get(name)
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if inspect.isfunction(member):
            found.append(inspect.unwrap(member))
    return found


def _package(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _last(argument: object) -> object:
    """Of an instruction that loads two variables, the one that ends on top."""
    return argument[-1] if isinstance(argument, tuple) else argument
