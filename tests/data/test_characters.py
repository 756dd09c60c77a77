"""Characters for few-shot classification: where they come from, and the tasks that are made of them."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from metamask_ext.data import characters, few_shot_tasks, glyphs, load_characters
from metamask_ext.data._torchvision import import_torchvision


@pytest.fixture(scope="module")
def font():
    return glyphs(note="why")


def test_glyphs(font):
    train, test = font.train, font.test
    total = len(train) + len(test)
    assert train.dtype == torch.uint8 and train.shape[1:] == test.shape[1:] == (20, 28, 28)
    assert 300 < total < 600 and len(train) == int(0.75 * total)
    assert font.source == f"{total} glyphs of DejaVu Sans (matplotlib)" and font.note == "why"
    every = torch.cat([train, test]).float() / 255
    ink = every.mean((2, 3))
    # Strokes, in every drawing; none fills the image, and none is cut off by more than a little at the edge.
    assert float(ink.min()) > 0.01 and float(ink.max()) < 0.5
    edge = torch.cat([every[..., [0, -1], :].flatten(2), every[..., [0, -1]].flatten(2)], 2)
    assert float(edge.mean()) < 0.02
    assert (every[:, 0] - every[:, 1]).abs().mean((1, 2)).min() > 0, "drawings differ"
    again, other = glyphs(), glyphs(seed=1)
    assert torch.equal(again.train, train) and not torch.equal(other.train, train)


def test_no_two_classes_look_alike(font):
    """A character is nearer to its own drawings than to another's, or to its own turned: else the task could not be done."""
    mean = (torch.cat([font.train, font.test]).float() / 255).mean(1)
    blurred = F.avg_pool2d(mean[:, None], 4, 2, 1)
    turned = torch.cat([torch.rot90(blurred, turns, (2, 3)) for turns in range(4)]).flatten(1)
    turned = F.normalize(turned - turned.mean(1, keepdim=True), dim=1)
    alike = turned[: len(mean)] @ turned.T
    alike[torch.arange(len(mean)), torch.arange(len(mean))] = 0
    assert float(alike.max()) < 0.99


def test_a_letter_that_turns_onto_itself_or_another_is_left_out():
    bar, corner = torch.zeros(56, 56), torch.zeros(56, 56)
    bar[8:48, 26:30] = 1
    corner[8:48, 8:14] = corner[42:48, 8:48] = 1
    kept = characters._distinct(torch.stack([bar, corner, torch.rot90(corner), torch.zeros(56, 56)]))
    assert torch.equal(kept, corner[None])


def _omniglot_files(root: Path, monkeypatch) -> None:
    """Writes archives as Omniglot's, and has their MD5 sums taken for those of the originals."""
    from PIL import Image

    omniglot = import_torchvision().datasets.Omniglot
    sums = {}
    (root / "omniglot-py").mkdir(exist_ok=True)
    for name, alphabets in (("images_background", ("Greek", "Latin")), ("images_evaluation", ("Tengwar",))):
        path = root / "omniglot-py" / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number, alphabet in enumerate(alphabets):
                for character in range(2):
                    for drawing in range(20):
                        image = Image.new("1", (105, 105), 1)  # white; a black square whose side tells the character
                        image.paste(0, (30, 30, 46 + 15 * character + 4 * number, 46))
                        png = io.BytesIO()
                        image.save(png, format="png")
                        file = f"{name}/{alphabet}/character{character + 1:02}/{character:04}_{drawing + 1:02}.png"
                        archive.writestr(file, png.getvalue())
        sums[name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(omniglot, "zips_md5", sums)


def test_omniglot_in_a_folder(tmp_path, monkeypatch):
    _omniglot_files(tmp_path, monkeypatch)
    monkeypatch.setattr(characters, "try_download", lambda *given: pytest.fail("downloaded"))
    got = load_characters(tmp_path)
    assert (got.source, got.note) == ("Omniglot (torchvision)", "")
    assert got.train.shape == (4, 20, 28, 28) and got.test.shape == (2, 20, 28, 28)
    every = torch.cat([got.train, got.test])
    assert every.dtype == torch.uint8 and int(every[:, :, :6].max()) == 0 and int(every.max()) == 255, "ink is 255, paper 0"
    ink = every.float().mean((1, 2, 3)) / 255 * 105 * 105
    wanted = sorted(16.0 * (16 + 15 * character + 4 * number) for number in (0, 1, 0) for character in (0, 1))
    torch.testing.assert_close(ink.sort().values, torch.tensor(wanted), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", characters.ARCHIVES)
def test_archives_that_are_not_omniglots(tmp_path, monkeypatch, name):
    _omniglot_files(tmp_path, monkeypatch)
    path = tmp_path / "omniglot-py" / f"{name}.zip"
    whole = path.read_bytes()
    for data in (whole[:-1], b"damaged", b"", whole + b"x"):
        path.write_bytes(data)
        for download in (False, True):
            with pytest.raises(RuntimeError, match=rf"{name}\.zip' is damaged, or not Omniglot: .* Delete it"):
                load_characters(tmp_path, download=download)


def test_what_was_extracted_is_not_read(tmp_path, monkeypatch):
    """It has no checksum: an extraction may have been killed, and files be edited."""
    _omniglot_files(tmp_path, monkeypatch)
    got = load_characters(tmp_path)
    folder = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character01"
    folder.mkdir(parents=True)
    (folder / "0000_01.png").write_bytes(b"half")
    again = load_characters(tmp_path)
    assert torch.equal(got.train, again.train) and torch.equal(got.test, again.test)


def test_omniglot_is_downloaded_once_if_it_can_be(tmp_path, monkeypatch):
    """torchvision's function fetches each archive, here from a folder."""
    import_torchvision()
    from torchvision.datasets import utils

    (tmp_path / "source").mkdir()
    _omniglot_files(tmp_path / "source", monkeypatch)
    fetched = []

    def download_url(url, root, filename, md5):
        fetched.append(url)
        shutil.copy(tmp_path / "source" / "omniglot-py" / filename, Path(root, filename))

    def try_download(url, function):
        function()

    monkeypatch.setattr(utils, "download_url", download_url)
    monkeypatch.setattr(characters, "try_download", try_download)
    assert load_characters(tmp_path).source == load_characters(tmp_path).source == "Omniglot (torchvision)"
    assert [url.rpartition("/")[2] for url in fetched] == ["images_background.zip", "images_evaluation.zip"]
    assert sorted(path.name for path in (tmp_path / "omniglot-py").iterdir()) == ["images_background.zip", "images_evaluation.zip"]


def test_without_omniglot_it_is_glyphs_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(characters, "try_download", lambda *given: "no answer in 3 s")
    got = load_characters(tmp_path)
    assert "glyphs" in got.source and got.note == f"no Omniglot in {str(tmp_path)!r}, download failed: no answer in 3 s"
    assert load_characters(tmp_path, download=False).note.endswith(", download off")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert load_characters(tmp_path).note.endswith(", torchvision is not installed")
    monkeypatch.undo()
    _omniglot_files(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="has Omniglot, and to read it: torchvision is not installed"):
        load_characters(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.ft2font", None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed: pip install \"metamask_ext\[experiments\]\""):
        glyphs()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_few_shot_tasks_image_by_image():
    """Every image is a drawing of its class, turned as all of that class are; classes and drawings do not repeat."""
    drawings = torch.randint(256, (3, 6, 4, 4), dtype=torch.uint8, generator=generator(1))
    support, query = few_shot_tasks(drawings, 50, ways=5, shots=2, queries=3, generator=generator())
    (x, y), (query_x, query_y) = support, query
    assert x.shape == (50, 10, 1, 4, 4) and query_x.shape == (50, 15, 1, 4, 4) and x.dtype == torch.float32
    assert (
        y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 50
        and query_y[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    )
    index = {
        torch.rot90(drawings[character, number], turns).numpy().tobytes(): (character, turns, number)
        for character in range(3)
        for number in range(6)
        for turns in range(4)
    }
    seen = set()
    for task in range(50):
        found = [
            (int(label), *index[(image[0] * 255).round().to(torch.uint8).numpy().tobytes()])
            for images, labels in (support, query)
            for image, label in zip(images[task], labels[task])
        ]
        assert len(set(found)) == 25, "different drawings"
        classes = {(label, character, turns) for label, character, turns, _ in found}
        assert len(classes) == len({one[1:] for one in classes}) == 5
        seen |= {one[1:] for one in classes}
    assert len(seen) == 12, "all characters in all turns"


def test_the_seed_decides():
    drawings = torch.rand(9, 4, 3, 3).mul(255).to(torch.uint8)
    first, again, other = (few_shot_tasks(drawings, 2, 3, 1, 1, generator(seed))[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 2, 1, 1), "tasks must be at least 1, got 0"),
        ((1, 2, 1, 0), "queries must be at least 1, got 0"),
        ((1, 13, 1, 1), r"ways must be at most 4 \* characters = 12, got 13"),
        ((1, 2, 3, 4), r"shots \+ queries must be at most the drawings of a character, 6, got 3 \+ 4"),
    ],
)
def test_refused_numbers(numbers, message):
    with pytest.raises(ValueError, match=message):
        few_shot_tasks(torch.zeros(3, 6, 4, 4, dtype=torch.uint8), *numbers, generator())
