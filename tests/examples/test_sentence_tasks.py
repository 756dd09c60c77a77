"""examples/sentence_tasks.py without its models: WordNet's files are read right, tasks are fair, the report says what was found."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import sentence_report
import torch
from sentence_tasks import Classifier, Settings, by_length, make_task, masked_classifier, read_runs
from torch import nn
from wordnet_glosses import FILES, Gloss, parse_line, read_glosses, side, split

from metamask_ext import MaskBank, conversion_report, using_task

DATA = {
    "noun": [
        "  1 This software and database is being provided to you  ",
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived  ",
        '00002137 05 n 02 Abyssinian_cat 0 cat 1 001 @ 00001740 n 0000 | a small slender breed; "she keeps two"; "a cat"  ',
        "00003000 05 n 01 tabby 0 000 | a cat with a striped coat  ",
        "00003100 13 n 01 stripe 0 000 | a cat with a striped coat  ",
        "00003200 05 n 01 queen 0 000 | a female cat  ",
        "00003300 05 n 01 she-cat 0 000 | a female cat  ",
    ],
    "verb": ['00004000 38 v 01 pad 0 000 01 + 02 00 | walk softly; "the cat padded"  '],
    "adj": ["00005000 00 a 02 galore(ip) 0 feline 0 000 | existing in abundance  "],
    "adv": ['00006000 02 r 0b a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 000 | in the letter "A"  '],
}


@pytest.fixture
def wordnet(tmp_path):
    for part, lines in DATA.items():
        (tmp_path / f"data.{part}").write_text("\n".join(lines) + "\n")
    return tmp_path


class TestGlosses:
    def test_lines(self):
        assert parse_line(DATA["noun"][2]) == Gloss("a small slender breed", "noun.animal", ("abyssinian_cat", "cat"))
        assert parse_line(DATA["verb"][0]) == Gloss("walk softly", "verb.motion", ("pad",))
        assert parse_line(DATA["adj"][0]).words == ("galore", "feline")
        assert parse_line(DATA["adv"][0]) == Gloss('in the letter "A"', "adv.all", tuple("abcdefghijk"))

    def test_files(self, wordnet):
        found = {gloss.text: gloss for gloss in read_glosses(wordnet)}
        assert len(found) == 6 and "a cat with a striped coat" not in found  # of two files
        assert found["a female cat"].words == ("queen", "she-cat")
        assert len(FILES) == 45 and FILES[38] == "verb.motion" and FILES[44] == "adj.ppl"

    def test_sides_share_no_word(self):
        words = [f"word{number}" for number in range(400)]
        glosses = [Gloss(f"{a} {b}", "noun.act", (a, b)) for a, b in itertools.pairwise(words)]
        glosses += [Gloss(word, "noun.act", (word,)) for word in words]
        sides = {where: {word for gloss in glosses if side(gloss) == where for word in gloss.words} for where in ("train", "test")}
        assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
        assert 0.2 < len(sides["test"]) / len(words) < 0.4
        pools = split(glosses)
        assert sum(map(len, pools.values())) == sum(side(gloss) is not None for gloss in glosses) < len(glosses)


def _pools(count=300):
    kept = ("noun.act", "noun.animal", "verb.body", "verb.motion", "adv.all")
    glosses = [Gloss(f"{file} {number}", file, (f"{file}{number}",)) for file in kept for number in range(count)]
    return split([*glosses, Gloss("alone", "noun.shape", ("alone",))])


class TestTasks:
    SETTINGS = Settings(steps=10, batch=16, test=50, least=20)

    def test_balanced_and_of_its_part_of_speech(self):
        task = make_task("noun.act", _pools(), self.SETTINGS, 0)
        for texts, labels in (task.train, task.test):
            assert labels.mean() == 0.5 and len(texts) == len(labels)
            assert {text.split()[0] for text, label in zip(texts, labels) if label} == {"noun.act"}
            assert {text.split()[0] for text, label in zip(texts, labels) if not label} <= {"noun.animal", "noun.shape", "alone"}
        assert len(task.train[0]) == 160 and len(task.test[0]) == 100
        assert not set(task.train[0]) & set(task.test[0])
        others = {text.split()[0] for text in make_task("adv.all", _pools(), self.SETTINGS, 0).train[0]}
        assert others >= {"noun.act", "verb.body"}

    def test_draws_differ_and_their_test_does_not(self):
        a, b = (make_task("verb.body", _pools(), self.SETTINGS, seed) for seed in (0, 1))
        assert a.test[0] == b.test[0] and a.train[0] != b.train[0]
        assert make_task("verb.body", _pools(), self.SETTINGS, 0).train[0] == a.train[0]

    def test_fewer_test_glosses_than_a_file_must_have(self):
        few = make_task("noun.act", _pools(), dataclasses.replace(self.SETTINGS, test=6), 0)
        assert len(few.test[0]) == 12

    def test_small_files(self):
        assert make_task("noun.shape", _pools(), self.SETTINGS, 0) is None
        few = make_task("noun.act", _pools(90), dataclasses.replace(self.SETTINGS, steps=40), 0)
        counts = [few.train[0].count(text) for text in set(few.train[0]) if text.startswith("noun.act")]
        assert max(counts) - min(counts) <= 1 < max(counts)

    def test_batches_by_length(self):
        texts = ["a" * (1 + number % 7) for number in range(100)]
        batches = list(by_length(texts, 16, np.random.default_rng(0)))
        assert sorted(np.concatenate(batches)) == list(range(100)) and max(map(len, batches)) <= 16
        assert all(np.ptp([len(texts[row]) for row in rows]) <= 2 for rows in batches)


class _Encoder(nn.Module):
    """Something with a configuration, an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 8})()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"last_hidden_state": self.linear(self.embedding(input_ids))})()


def test_masked_classifier_begins_as_the_plain_one_and_serves_bits():
    plain = Classifier(_Encoder()).eval()
    model = masked_classifier(plain, Settings())
    batch = {"input_ids": torch.randint(20, (4, 5)), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 4)}
    assert torch.allclose(model(batch), plain(batch), atol=1e-6)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 3:] = 1
    assert torch.allclose(plain(changed), plain(batch))  # padding is not read
    assert {left.name for left in conversion_report(model).left} == {"encoder.embedding", "head"}
    bank = MaskBank(model, per_task="head.*")
    bank.add_task("b")
    bank.pack("b")
    assert bank.bytes_per_task("b") == 8 + 1 + 4 * 9
    with torch.no_grad(), using_task(model, ["b", "default", "b", "b"]):
        assert model(batch).shape == (4,)


class TestRuns:
    def test_a_line_that_was_cut(self, tmp_path):
        path, settings = tmp_path / "runs.jsonl", Settings(seeds=(0, 1))
        assert read_runs(path, settings) == []
        path.write_text(json.dumps(dataclasses.asdict(settings)) + '\n{"task": "a"}\n{"task": "b", "se')
        assert read_runs(path, settings) == [{"task": "a"}]
        assert path.read_text().endswith('{"task": "a"}\n')
        with pytest.raises(SystemExit, match="other settings"):
            read_runs(path, Settings(seeds=(0, 1), steps=3))


def _run(task, seed, method, accuracy, size=100):
    return {"task": task, "seed": seed, "method": method, "tested": 40, "accuracy": accuracy, "bytes": size, "seconds": 1.0}


def _runs(masks, lora, seeds=(0, 1, 2), tasks=("a", "b", "c")):
    values = {"words": 0.7, "probe": 0.8, "masks": masks, "lora": lora, "full": 0.9}
    return [_run(task, seed, method, values[method]) for task in tasks for seed in seeds for method in sentence_report.METHODS]


SERVED = {"plain": 100.0, "masks": 120.0, "lora": 400.0}


def _report(runs):
    return sentence_report.report(dataclasses.asdict(Settings()), runs, SERVED)


class TestReport:
    def test_what_holds_and_what_does_not(self):
        page = _report(_runs(0.85, 0.87))
        assert "3 tasks, 3 draws" in page and "| metamask, one bit a weight | 85.00 % | ± 0.00 | 100 | 1.0 |" in page
        assert "| 40 tasks or more count | 3 | does not hold |" in page
        assert "| mean accuracy at most 1 point below LoRA | -2.00 [-2.00, -2.00] | does not hold |" in page
        assert "| at least 3 times peft's throughput | 3.33 | holds |" in page
        assert "| at most 1.3 times the plain encoder's time | 1.20 | holds |" in page
        assert "metamask 120 ms (533 sentences a second)" in page

    def test_one_draw_has_no_interval(self):
        page = _report(_runs(0.9, 0.9, seeds=(0,)))
        assert "one draw" in page and "±" not in page and "| +0.00 [+0.00, +0.00] | holds |" in page

    def test_trivial_and_unfinished_tasks_do_not_count(self):
        runs = _runs(0.85, 0.87)
        runs += [_run("easy", 0, method, 0.99) for method in sentence_report.METHODS]
        runs += [_run("half", 0, method, 0.5) for method in ("words", "masks")]
        page = _report(runs)
        assert "3 tasks, 3 draws" in page and "Left out: 1 draw of tasks" in page and "half" not in page

    def test_interval_over_draws(self):
        runs = _runs(0.8, 0.8)
        for run in runs:
            run["accuracy"] += 0.01 * run["seed"]
        # sd 0.01 over 3 draws: 4.303 * 0.01 / sqrt(3)
        assert "81.00 % | ± 2.48" in _report(runs)
