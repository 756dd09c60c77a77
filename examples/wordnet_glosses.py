"""WordNet's definitions, and which of them are for training: for examples/sentence_tasks.py."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

FILES = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body"),
    *("noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location"),
    *("noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body", "verb.change"),
    *("verb.cognition", "verb.communication", "verb.competition", "verb.consumption", "verb.contact", "verb.creation"),
    *(
        "verb.emotion",
        "verb.motion",
        "verb.perception",
        "verb.possession",
        "verb.social",
        "verb.stative",
        "verb.weather",
        "adj.ppl",
    ),
)
"""WordNet's lexicographer files by number: lexnames(5WN)."""


@dataclass(frozen=True)
class Gloss:
    """The definition of a synset, without its examples, the file it is in, and its words."""

    text: str
    file: str
    words: tuple[str, ...]


def read_glosses(folder: Path) -> list[Gloss]:
    """Every definition of WordNet's ``data.*`` once, with the words of all its synsets: wndb(5WN). Texts of two files go."""
    found: dict[str, list[Gloss]] = {}
    for part in ("adj", "adv", "noun", "verb"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                gloss = parse_line(line)
                found.setdefault(gloss.text, []).append(gloss)
    return [
        Gloss(text, same[0].file, tuple(word for gloss in same for word in gloss.words))
        for text, same in found.items()
        if len({gloss.file for gloss in same}) == 1
    ]


def parse_line(line: str) -> Gloss:
    """``offset file type count word id ... | definition; "example"``; the count is hexadecimal."""
    data, _, text = line.partition(" | ")
    fields = data.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    plain = tuple(re.sub(r"\(\w+\)$", "", word).lower() for word in words)  # adjectives have markers, as in "galore(ip)"
    return Gloss(re.split(r';\s*"', text, maxsplit=1)[0].strip(" ;"), FILES[int(fields[1])], plain)


def side(gloss: Gloss) -> str | None:
    """``"train"`` or ``"test"``, where all of its words are on that side; None for a gloss of both."""
    sides = {"test" if hashlib.sha256(word.encode()).digest()[0] < 77 else "train" for word in gloss.words}  # 30 %
    return sides.pop() if len(sides) == 1 else None


Pools = dict[tuple[str, str], list[str]]
"""Texts by side and file."""


def split(glosses: list[Gloss]) -> Pools:
    """The texts of both sides, by file."""
    pools: Pools = {(where, file): [] for where in ("train", "test") for file in FILES}
    for gloss in glosses:
        where = side(gloss)
        if where is not None:
            pools[where, gloss.file].append(gloss.text)
    return pools
