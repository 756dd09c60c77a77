"""The table that says how masked linear layers multiply on the CPU: by panels, or through torch's BLAS (csrc/cpu/products.h).

Panels keep theta and its gradient in cache and pass over all of x once a panel, which costs more the larger the batch is; BLAS
needs both in memory and passes over x a few times in all. Which is faster depends on the processor, so the choice is a table:
measured on the processors in ``products.json``, and elsewhere made from the size of the second-level cache. ``metamask tune``
measures this machine and writes a file, which is used from then on. Nothing is timed while a model runs: the same table gives the
same bits.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch

from ._build import BACKEND
from .files.read import read_json

Pass = Literal["forward", "backward"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""The types of products; float16, and bfloat16 on processors that do not multiply it, are multiplied as float32."""
FORMAT = 1
LARGEST = 1 << 40
MOST_LINES = 10_000
"""A product of a large batch looks at every line."""
_FILE = Path(__file__).with_name("products.json")
# x may be this many times as large as the second-level cache before BLAS is taken, where nothing was measured: of AMD Zen 4, whose
# panels and BLAS are equally fast in cache.
_CACHES: Mapping[Pass, float] = {"forward": 9.0, "backward": 2.0}


class Line(NamedTuple):
    """With ``threads`` threads, ``pass_`` over a weight [out, in] goes through BLAS from ``rows`` rows of the batch on."""

    pass_: Pass
    dtype: str
    threads: int
    in_features: int
    out_features: int
    rows: int


class Table(NamedTuple):
    """Lines, of which the one nearest to a product decides, and where they come from. Without lines everything is panels.

    A mixed-task batch is multiplied as its rows together would be, except that tasks with fewer than ``task_rows`` rows each stay
    with panels: BLAS makes a theta for each task.
    """

    source: str
    lines: tuple[Line, ...]
    task_rows: int = 64

    @property
    def digest(self) -> str:
        """SHA-256 of lines and ``task_rows``, in 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self[1:]).encode()).hexdigest()[:16]


PANELS = Table("panels only", ())


class Processor(NamedTuple):
    """The processor of this process, and the instruction set that the kernels use on it."""

    vendor: str
    family: int
    capability: str


@cache
def processor() -> Processor:
    """Describe the processor as ``/proc/cpuinfo`` does; vendor ``platform.machine()`` and family 0 where there is none."""
    vendor, family = platform.machine(), 0
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open() as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key == "vendor_id":
                    vendor = value
                elif key == "cpu family":
                    family = int(value)
                    break
    return Processor(vendor, family, _compiled().build_info()["cpu_capability"])


def machine_file() -> Path:
    """The file that ``metamask tune`` writes: variable ``METAMASK_PRODUCTS``, else this processor's in the user's settings.

    One folder may serve several machines, and one machine several instruction sets (``METAMASK_CPU_CAPABILITY``).

    Raises:
        RuntimeError: nothing says where that folder is (``HOME`` is not set, and the user is unknown).
    """
    named = os.environ.get("METAMASK_PRODUCTS")
    if named:
        return Path(named)
    name = re.sub(r"[^\w.]+", "_", " ".join(map(str, processor())), flags=re.ASCII)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "metamask_ext" / f"products_{name}.json"


def known_table() -> Table:
    """The table of the package for this processor: measured lines, else lines made from the size of its second-level cache."""
    caches = _CACHES
    for entry in json.loads(_FILE.read_text())["processors"]:
        if tuple(entry[key] for key in Processor._fields) == processor():
            if "lines" in entry:
                return Table(entry["name"], tuple(Line(*line) for line in entry["lines"]))
            caches = entry["caches"]
    return modelled_table(_compiled().second_level_cache(), caches)


def modelled_table(cache_bytes: int, caches: Mapping[Pass, float] = _CACHES) -> Table:
    """Lines by which BLAS is taken once x has ``caches[pass]`` times the bytes of the second-level cache, at width 1024.

    At another width a forward takes BLAS at a batch that goes with the root of 1024 / width: theta, which it writes, grows too.
    """
    lines = []
    for dtype, torch_dtype in DTYPES.items():
        for pass_, factor in caches.items():
            for width in (64, 256, 1024, 4096, 16384):
                columns = math.sqrt(1024 * width) if pass_ == "forward" else width
                rows = max(128, int(factor * cache_bytes / (columns * torch_dtype.itemsize)))
                lines.append(Line(pass_, dtype, 1, width, 1024, rows))
    return Table(f"modelled for a second-level cache of {cache_bytes >> 10} KiB", tuple(lines))


def read_table(path: Path) -> Table:
    """The table in a file of ``metamask tune``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or of another processor; the message names it.
    """
    try:
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            got = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"format must be {FORMAT}, got {got!r:.100}")
        if value.get("processor") != list(processor()):
            raise ValueError(f"processor must be {list(processor())}, got {value.get('processor')!r:.100}")
        if len(value["lines"]) > MOST_LINES:
            raise ValueError(f"lines must be at most {MOST_LINES:,}, got {len(value['lines']):,}")
        table = Table(str(path), tuple(_line(line) for line in value["lines"]), _number(value["task_rows"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no table of products for this machine ({error}): remove it, or unset METAMASK_PRODUCTS if "
            "that names it, and run 'metamask tune' again"
        ) from error
    return table


def as_json(table: Table) -> dict[str, object]:
    """The contents of a file of this processor's table."""
    return {
        "format": FORMAT,
        "processor": list(processor()),
        "task_rows": table.task_rows,
        "lines": [list(line) for line in table.lines],
    }


def current() -> Table:
    """The table in use."""
    return _current


def install(table: Table) -> None:
    """Use ``table`` from now on, in all threads of the process; calls that run keep the one they began with."""
    global _current
    if BACKEND != "reference":
        module = _compiled()
        lines = [(getattr(module.Pass, pass_), DTYPES[dtype], *numbers) for pass_, dtype, *numbers in table.lines]
        module.set_products(lines, table.task_rows)
    _current = table


@contextmanager
def using_table(table: Table) -> Iterator[None]:
    """Use ``table`` inside, in all threads of the process. Two threads must not do this at once: each puts back what it found."""
    before = _current
    install(table)
    try:
        yield
    finally:
        install(before)


def install_default() -> None:
    """Use the machine's file if there is one, else the package's table.

    Raises:
        OSError, ValueError: of :func:`read_table`; or ``METAMASK_PRODUCTS`` names a file that is not there.
    """
    if BACKEND == "reference":
        return
    named = os.environ.get("METAMASK_PRODUCTS")
    if named and not os.path.lexists(named):
        why = "METAMASK_PRODUCTS names a file that is not there: unset it, and write one with 'metamask tune --out FILE'"
        raise FileNotFoundError(errno.ENOENT, why, named)
    install(read_table(Path(named)) if named else _machine_table() or known_table())


def through_blas(pass_: Pass, dtype: torch.dtype, batch: int, in_features: int, out_features: int) -> bool:
    """Tell if a pass over a weight of this size goes through BLAS now; ``dtype`` is that of the product."""
    module = _compiled()
    return bool(module.through_blas(getattr(module.Pass, pass_), dtype, batch, in_features, out_features))


def _machine_table() -> Table | None:
    """The table in the user's folder of settings; None if there is none, or no folder that this process may look into."""
    try:
        path = machine_file()
    except RuntimeError:  # a user without a home, as in many containers, has no settings either
        return None
    return read_table(path) if os.path.exists(path) else None


def _compiled() -> ModuleType:
    return import_module("metamask_ext._C")


def _line(line: object) -> Line:
    if not isinstance(line, list) or len(line) != len(Line._fields):
        raise ValueError(f"a line must have {len(Line._fields)} entries, got {line!r:.100}")
    pass_, dtype, *numbers = line
    if pass_ not in get_args(Pass) or dtype not in DTYPES:
        raise ValueError(f"a line must begin with one of {get_args(Pass)} and one of {tuple(DTYPES)}, got {line!r:.100}")
    return Line(pass_, dtype, *map(_number, numbers))


def _number(value: object) -> int:
    if type(value) is not int or not 0 < value <= LARGEST:
        raise ValueError(f"numbers must be integers from 1 to 2**40, got {value!r:.100}")
    return value


_current = PANELS
