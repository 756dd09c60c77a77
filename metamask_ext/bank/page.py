"""The picture of a bank: one HTML page that needs nothing else, drawn by Plotly, which is in it."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from .statistics import Layer, Masks, Statistics, nearest, order, statistics
from .store import Store

PICTURES = 7_000_000
"""The bytes of all pictures of masks, at most."""
_OVERLAPS = 2048
_CELLS = 240
"""The rows and columns of the picture of overlaps, at most: more tasks share them."""
_BARS = 120
_KINDS = 11
_NEEDED = ("plotly", "scipy")


class ViewError(RuntimeError):
    """A picture cannot be made: the extra is not installed, or the bank is too large for one page."""


def page(directory: Path) -> str:
    """Return the page of the bank in a folder.

    Raises:
        BankError: no bank is there, or it is damaged.
        ViewError: the extra ``view`` is not installed, or the bank has more than 2,048 tasks.
    """
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ViewError(f"the picture needs {', '.join(absent)}: pip install 'metamask-ext[view]'")
    from plotly.offline import get_plotlyjs

    masks = Masks(Store.open(directory))
    if len(masks.names) > _OVERLAPS:
        raise ViewError(f"the bank has {len(masks.names):,} tasks, and a page shows at most {_OVERLAPS:,}")
    data = json.dumps(_data(masks, statistics(masks, PICTURES)), allow_nan=False).replace("</", "<\\/")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, middle, after = template.replace("/*PLOTLY*/", "\0").replace("/*DATA*/", "\0").split("\0")
    return before + str(get_plotlyjs()).replace("</script", "<\\/script") + middle + data + after


def _data(masks: Masks, found: Statistics) -> dict[str, Any]:
    leaves = order(found.overlap)
    weights = sum(layer.size for layer in masks.layers)
    shared = sum(tensor.numel() for tensor in masks.store.shared().values() if tensor.is_floating_point())
    metrics = [masks.metrics(name) for name in masks.names]
    used, used_names = _few([*found.used], [layer.path for layer in masks.layers])
    width = max(1, -(-len(used[0]) // _BARS))
    size = sum(masks.store.bytes_per_task(name) for name in masks.names)
    shown, saves = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB", masks.store.opened.commit + 1
    summary = f"{len(masks.layers)} masked layers, {weights:,} weights; {shown} of tasks; save number {saves}"
    return {
        "title": f"Bank {masks.store.directory.name}: {len(masks.names):,} tasks",
        "summary": summary,
        "names": masks.names,
        "layers": [_described(layer, float(found.density[:, number].mean())) for number, layer in enumerate(masks.layers)],
        "weights": weights,
        "unmasked": max(0, shared - weights),
        "density": numpy.round(found.density.astype(float), 4).tolist(),
        "overlap": _encoded(numpy.rint(found.overlap * 255).astype(numpy.uint8)),
        "sampled": found.sampled,
        "nearest": [nearest(found.overlap, row, 5) for row in range(len(masks.names))],
        "order": leaves,
        "blocks": _blocks(leaves, masks.names),
        "used": [_binned(counts, width).tolist() for counts in used],
        "used_names": used_names,
        "used_width": width,
        "independent": numpy.round(_binned(_independent(found, masks.layers), width), 1).tolist(),
        "pictures": [
            {"layer": number, "rows": picture.shape[1], "columns": picture.shape[2], "values": _encoded(picture)}
            for number, picture in zip(found.shown, found.pictures)
        ],
        "accuracy": {
            "before": [_accuracy(each.before_packing) for each in metrics],
            "after": [_accuracy(each.now) for each in metrics],
        },
    }


def _described(layer: Layer, density: float) -> dict[str, Any]:
    return {"path": layer.path, "shape": layer.shape, "rows": layer.rows, "columns": layer.columns, "density": round(density, 4)}


def _encoded(values: NDArray[numpy.uint8]) -> str:
    return base64.b64encode(numpy.ascontiguousarray(values).tobytes()).decode()


def _accuracy(metrics: Mapping[str, float]) -> float | None:
    value = metrics.get("accuracy")
    return None if value is None else float(value)


def _blocks(leaves: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Neighbours in the order of the overlaps, together in as many groups as can be drawn."""
    groups = [group.tolist() for group in numpy.array_split(numpy.array(leaves), min(len(leaves), _CELLS))]
    labels = [_label(names[group[0]]) + (f" … ({len(group)} tasks)" if len(group) > 1 else "") for group in groups]
    # Plotly takes two equal labels for one.
    seen: dict[str, int] = {}
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[number] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return {"labels": labels, "members": groups}


def _label(name: str) -> str:
    """A name as Plotly, which knows some tags, shows it."""
    cut = name if len(name) <= 26 else name[:25] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _few(counts: list[NDArray[numpy.int64]], names: list[str]) -> tuple[list[NDArray[numpy.int64]], list[str]]:
    """The layers of a stack that can be told apart; the smaller ones together."""
    if len(counts) <= _KINDS + 1:
        return counts, names
    largest = sorted(sorted(range(len(counts)), key=lambda number: -int(counts[number].sum()))[:_KINDS])
    rest = [counts[number] for number in range(len(counts)) if number not in largest]
    together = numpy.sum(rest, axis=0).astype(numpy.int64)
    return [*(counts[number] for number in largest), together], [*(names[number] for number in largest), f"{len(rest)} others"]


def _binned(counts: NDArray[Any], width: int) -> NDArray[Any]:
    padded = numpy.pad(counts, (0, -len(counts) % width))
    found: NDArray[Any] = padded.reshape(-1, width).sum(1)
    return found


def _independent(found: Statistics, layers: Sequence[Layer]) -> NDArray[numpy.float64]:
    """The weights used by k tasks if each task chose as many of a layer as it did, independently: a sum of Bernoulli variables."""
    total = numpy.zeros(len(found.density) + 1)
    for number, layer in enumerate(layers):
        shares = numpy.array([1.0])
        for density in found.density[:, number].astype(float):
            shares = numpy.append(shares, 0.0) * (1 - density) + numpy.insert(shares, 0, 0.0) * density
        total += layer.size * shares
    return total
