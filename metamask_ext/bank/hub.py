"""The layout of a folder on a model hub: a bank, or tasks without their base, with a card that people read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..files.atomic import write_atomic
from ..files.read import MAX_BYTES, parse_json, read_file
from ..nn.names import escape
from .artefact import Artefact
from .index import INDEX, BankError, BankNotFoundError

CONFIG, CARD = "config.json", "README.md"
_FORMAT = 1
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE = re.compile(r"[A-Za-z0-9_%-]{1,120}\.task\.safetensors")


def folder_of(where: str | os.PathLike[str], revision: str | None) -> Path:
    """Return a folder as it is given, or the one into which a repository of the hub was downloaded.

    Raises:
        BankNotFoundError: there is no such folder, and it cannot be downloaded: it is no id, or huggingface_hub is not installed.
    """
    path = Path(where)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for a repository of the hub, and {str(path)!r} is a folder")
        return path
    if not isinstance(where, str) or not _ID.fullmatch(where):
        raise BankNotFoundError(f"{path}: no such folder, and no id of a hub's repository ('owner/name')")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BankNotFoundError(f"{path}: no such folder; to download the repository {where!r}: pip install huggingface_hub")
    import huggingface_hub

    patterns = [INDEX, CONFIG, CARD, "*.safetensors"]
    return Path(huggingface_hub.snapshot_download(where, revision=revision, allow_patterns=patterns))


def write_tasks(folder: Path, artefacts: Mapping[str, Artefact], card: str | None) -> None:
    """Write tasks without their base, each in its file, and the list of them last."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: _file_name(name) for name in artefacts}
    for name, artefact in artefacts.items():
        write_atomic(folder / files[name], artefact.encode())
    first = next(iter(artefacts.values()))
    config = {
        "library_name": "metamask_ext",
        "metamask_tasks": _FORMAT,
        "base": {"name": first.base_name, "sha256": first.base_sha256},
        "tasks": files,
    }
    write_card(folder, card, first.base_name, list(artefacts), base_is_here=False)
    write_atomic(folder / CONFIG, json.dumps(config, indent=2).encode())


def write_card(folder: Path, card: str | None, base_name: str, names: list[str], *, base_is_here: bool) -> None:
    """Write the card; one that is there stays, unless ``card`` is given."""
    if card is None and (folder / CARD).exists():
        return
    what = "A bank: shared weights, and the masks of" if base_is_here else "Masks, without the weights that they belong to, of"
    shown = "".join(f"- {name}\n" for name in names[:20]) + (f"- and {len(names) - 20} more\n" if len(names) > 20 else "")
    text = (
        "---\nlibrary_name: metamask_ext\ntags:\n- masks\n---\n\n"
        f"# Tasks of {base_name}\n\n{what} {len(names)} tasks:\n\n{shown}\n"
        "```python\nbank = metamask_ext.MaskBank.from_pretrained(folder, model)\n```\n"
    )
    write_atomic(folder / CARD, (text if card is None else card).encode())


def task_files(folder: Path) -> dict[str, Path]:
    """Return the files of tasks without their base that a folder lists, by name.

    Raises:
        BankNotFoundError: it lists none.
        BankError: its list is none of this library, or of another format.
    """
    path = folder / CONFIG
    try:
        config = parse_json(read_file(path, MAX_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BankNotFoundError(f"{folder}: holds neither {INDEX} nor {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise BankError(f"{path}: cannot be read: {error}") from error
    version = config.get("metamask_tasks") if isinstance(config, dict) else None
    if version != _FORMAT:
        raise BankError(f"{path}: lists no tasks of metamask_ext (format {version!r:.20}, this version reads {_FORMAT})")
    files = config.get("tasks")
    if not isinstance(files, dict) or not all(isinstance(file, str) and _FILE.fullmatch(file) for file in files.values()):
        raise BankError(f"{path}: tasks must be files of the folder by name, got {files!r:.100}")
    return {name: folder / file for name, file in files.items()}


def _file_name(task: str) -> str:
    """Name a task's file: two names that differ in their case, or are cut, get others."""
    key = escape(task)
    if len(key) > 60 or key != key.lower():
        key = f"{re.sub('%[0-9A-F]?$', '', key[:60])}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return f"{key}.task.safetensors"
