"""Numbers of a bank's masks, against masks that were made by hand; the commands that print it; the page."""

from __future__ import annotations

import json
import re

import numpy
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from metamask_ext import MaskBank, unpack_mask
from metamask_ext.bank import BankError, Store
from metamask_ext.bank.page import ViewError, page
from metamask_ext.bank.statistics import SAMPLE, Layer, Masks, _reduced, _sample, _sides, described, nearest, order, statistics
from metamask_ext.cli import app
from metamask_ext.nn import MaskedConv2d, MaskedLinear

NAMES = ["a", "b", "c</script><b>", "d"]


def net(gate="sigmoid"):
    options = {"gate": gate, "threshold": 0.25} if gate == "hard" else {}
    return nn.Sequential(MaskedConv2d(2, 3, 3, **options), nn.Flatten(), MaskedLinear(12, 5, **options), nn.Linear(5, 2))


@pytest.fixture(params=["sigmoid", "hard"])
def bank(request, tmp_path):
    bank = MaskBank(net(request.param))
    for name in NAMES:
        bank.add_task(name)
    bank.record("a", accuracy=0.5)
    bank.pack("a"), bank.pack("b")
    bank.record("a", accuracy=0.25)
    bank.remove_task("default")
    bank.save(tmp_path / "bank")
    return bank


def by_hand(bank, name):
    found = []
    for layer in (bank.model[0], bank.model[2]):
        mask = layer.masks[name]
        limit = 0.25 if layer.gate == "hard" else 0.0
        on = unpack_mask(mask, layer.weight.shape) if mask.dtype == torch.uint8 else mask.detach() > limit
        found.append(on.bool().flatten(1).numpy())
    return found


def test_masks_are_those_of_the_gates(bank, tmp_path):
    masks = Masks(Store.open(tmp_path / "bank"))
    assert masks.names == NAMES and [layer.shape for layer in masks.layers] == [(3, 2, 3, 3), (5, 12)]
    for name in NAMES:
        for ours, wanted in zip(masks.of(name), by_hand(bank, name), strict=True):
            assert numpy.array_equal(ours, wanted)


def test_numbers(bank, tmp_path):
    found = statistics(Masks(Store.open(tmp_path / "bank")), 10**6)
    flat = numpy.array([numpy.concatenate([mask.reshape(-1) for mask in by_hand(bank, name)]) for name in NAMES])
    assert found.sampled == flat.shape[1]  # few: all of them
    for i, one in enumerate(flat):
        for j, other in enumerate(flat):
            assert found.overlap[i, j] == pytest.approx((one & other).sum() / (one | other).sum(), abs=1e-6)
    for number in range(2):
        its = numpy.array([by_hand(bank, name)[number] for name in NAMES])
        numpy.testing.assert_allclose(found.density[:, number], its.reshape(4, -1).mean(1), atol=1e-6)
        assert found.used[number].tolist() == numpy.bincount(its.sum(0).reshape(-1), minlength=5).tolist()
        assert numpy.array_equal(found.pictures[number], its * numpy.uint8(255))


def test_order_puts_those_that_share_weights_together():
    chance = numpy.random.default_rng(0)
    group = chance.permutation(numpy.repeat(numpy.arange(3), 5))
    overlap = (0.3 + 0.5 * (group[:, None] == group) + 0.01 * chance.random((15, 15))).astype(numpy.float32)
    ordered = group[order(overlap)]
    assert (numpy.diff(ordered) != 0).sum() == 2
    assert all(group[other] == group[4] for other in nearest(overlap, 4, 4)) and 4 not in nearest(overlap, 4, 4)
    assert [order(numpy.ones((count, count), numpy.float32)) for count in (1, 2)] == [[0], [0, 1]]


def test_samples_and_pictures_of_large_layers():
    layers = [Layer("0", (1000, 200)), Layer("1", (3,)), Layer("2", (500, 2, 3))]
    places = _sample(layers)
    assert SAMPLE <= sum(map(len, places)) <= SAMPLE + 3 and all(len(set(chosen.tolist())) == len(chosen) for chosen in places)
    assert all(chosen.max() < layer.size for chosen, layer in zip(places, layers))
    for budget in (10**7, 10**5, 10**3, 1):
        shown, sides = _sides(layers, 10, budget)
        size = 10 * sum(height * width for height, width in sides)
        assert size <= budget or len(shown) == 1
        assert len(shown) == len(sides) and set(shown) <= {0, 1, 2}
    mask = numpy.zeros((10, 7), bool)
    mask[:5] = True
    reduced = _reduced(mask, 2, 3)
    assert reduced.tolist() == [[255] * 3, [0] * 3] and _reduced(mask, 10, 7).max() == 255
    assert _reduced(mask, 3, 7)[:, 0].tolist() == [255, 170, 0] or _reduced(mask, 3, 7)[:, 0].tolist() == [255, 85 * 2, 0]


class TestCommands:
    def run(self, *arguments):
        return CliRunner().invoke(app.app, ["bank", *map(str, arguments)])

    def test_inspect(self, bank, tmp_path):
        folder = tmp_path / "bank"
        result = self.run("inspect", folder, "a", "--json")
        found = json.loads(result.stdout)
        assert result.exit_code == 0 and found == described(Masks(Store.open(folder)), "a")
        assert (found["slot"], found["masks"], found["metrics"], found["metrics_before_packing"]) == (
            *(1, "bits"),
            *({"accuracy": 0.25}, {"accuracy": 0.5}),
        )
        assert [layer["layer"] for layer in found["layers"]] == ["0", "2"] and len(found["nearest"]) == 3
        assert found["layers"][1]["density"] == pytest.approx(by_hand(bank, "a")[1].mean())
        lines = self.run("inspect", folder, "a").stdout.splitlines()
        assert lines[0].startswith("a: slot 1, bits") and lines[1:3] == ["recorded: accuracy 0.25", "before packing: accuracy 0.5"]
        assert lines[4].startswith("layer 2: 5x12, ") and sum(line.startswith("overlap ") for line in lines) == 3
        result = self.run("inspect", folder, "x")
        assert result.exit_code == 2 and "has no task 'x'" in result.stderr

    def test_a_damaged_bank_and_none(self, bank, tmp_path):
        (path,) = (tmp_path / "bank").glob("tasks/b-*")
        path.write_bytes(b"?")
        for arguments in (("inspect", tmp_path / "bank", "b"), ("inspect", tmp_path / "none", "b")):
            result = self.run(*arguments)
            assert result.exit_code == 1 and result.stderr.startswith("error: ")

    def test_view_without_plotly_says_what_to_install(self, bank, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = self.run("view", tmp_path / "bank", "--out", tmp_path / "x.html")
        assert result.exit_code == 1 and "pip install 'metamask-ext[view]'" in result.stderr
        assert not (tmp_path / "x.html").exists()
        with pytest.raises(ViewError, match="plotly"):
            page(tmp_path / "bank")

    def test_view(self, bank, tmp_path):
        pytest.importorskip("plotly")
        result = self.run("view", tmp_path / "bank", "--out", tmp_path / "x.html")
        assert result.exit_code == 0, result.output
        text = (tmp_path / "x.html").read_text()
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert data is not None
        found = json.loads(data[1])
        assert found["names"] == NAMES
        assert found["accuracy"] == {
            "before": [0.5, None, None, None],
            "after": [0.25, None, None, None],
        }
        assert sum(map(len, found["blocks"]["members"])) == 4 and found["weights"] == 54 + 60
        assert sum(found["independent"]) == pytest.approx(54 + 60, abs=1)
        with pytest.raises(BankError):
            page(tmp_path / "none")
