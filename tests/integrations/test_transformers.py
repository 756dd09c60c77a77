"""TaskTrainer on a tiny BERT: the right task in each step, no block left open; ``make test-engines`` has transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="make test-engines has it")
pytest.importorskip("metamask_ext.integrations.transformers", reason="make test-engines has transformers", exc_type=ImportError)
from support.tiny_bert import Sentences, bert
from transformers import TrainingArguments

import metamask_ext as mm
from metamask_ext.integrations.transformers import TaskTrainer
from metamask_ext.nn.context import AmbiguousTaskError


def _arguments(folder, **options) -> TrainingArguments:
    quiet = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    small = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(str(folder), **{**quiet, **small, **options})


def _masks(model, task):
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith(f".masks.{task}")]


def _closed(model):
    with pytest.raises(AmbiguousTaskError):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64))


class Seen(TaskTrainer):
    """Remembers the task of each step."""

    def compute_loss(self, model, inputs, *more, **options):
        layer = self.model.bert.pooler.dense
        active = [task for task in mm.tasks(self.model) if layer.masks[task] is layer.mask_logits]
        self.__dict__.setdefault("seen", []).append(active[0])
        return super().compute_loss(model, inputs, *more, **options)


@pytest.mark.parametrize(
    ("tasks", "every", "seen"),
    [(["a", "b"], "epoch", "aabb"), ({0: "a", 3: "default"}, "step", ["a", "a", "a", "default"]), (["a", "b"], "step", "abab")],
)
def test_schedules(tmp_path, tasks, every, seen):
    model = bert()
    trainer = Seen(model, _arguments(tmp_path, num_train_epochs=2), train_dataset=Sentences(16), tasks=tasks, every=every)
    before = {task: _masks(model, task) for task in mm.tasks(model)}
    trainer.train()
    assert trainer.seen == [*seen]
    for task in mm.tasks(model):
        moved = [not torch.equal(old, new) for old, new in zip(before[task], _masks(model, task))]
        assert all(moved) if task in seen else not any(moved)
    _closed(model)


def test_accumulated_steps_have_one_task(tmp_path):
    trainer = Seen(
        bert(),
        _arguments(tmp_path, num_train_epochs=2, gradient_accumulation_steps=2),
        train_dataset=Sentences(32),
        tasks=["a", "b"],
        every="step",
    )
    trainer.train()
    assert trainer.seen == [*"aabbaabb"]


def test_equals_a_loop_by_hand(tmp_path):
    model, expected, sentences = bert(), bert(("a", "b")), Sentences(16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    trainer = TaskTrainer(
        model,
        _arguments(tmp_path, num_train_epochs=2, max_grad_norm=0.0, train_sampling_strategy="sequential"),
        train_dataset=sentences,
        tasks="default",
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    mm.add_task(model, "a"), mm.add_task(model, "b")
    trainer.train()
    by_hand = torch.optim.SGD(expected.parameters(), 0.1)
    for step in range(4):
        samples = [sentences[index] for index in range(step % 2 * 8, step % 2 * 8 + 8)]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        with mm.using_task(expected, "default"):
            expected(**batch).loss.backward()
        by_hand.step(), by_hand.zero_grad()
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


def test_each_sample_names_its_task(tmp_path):
    """Mixed batches; evaluation under one task, and under that of each sample."""
    model = bert(("b",))
    sentences = Sentences(64, (0, 1), named=True)
    options = {"num_train_epochs": 30, "remove_unused_columns": False}
    trainer = TaskTrainer(
        model, _arguments(tmp_path, **options), train_dataset=sentences, eval_dataset=sentences, task_column="task"
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss < 0.5 < before
    one = TaskTrainer(model, _arguments(tmp_path, **options), eval_dataset=sentences, task_column="task", evaluate="b")
    batch = {key: torch.stack([sentences[index][key] for index in range(64)]) for key in sentences[0]}
    batch.pop("task")
    with torch.no_grad(), mm.using_task(model, "b"):
        assert one.evaluate()["eval_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert one.evaluate()["eval_loss"] > loss
    with pytest.raises(
        ValueError, match="task_column must be an entry of each batch, got 'task' and a batch with input_ids, labels"
    ):
        trainer.evaluate(Sentences(8))
    _closed(model)


def test_temperature_and_decay(tmp_path):
    model = bert()
    trainer = TaskTrainer(
        model,
        _arguments(tmp_path, num_train_epochs=2, weight_decay=0.1),
        train_dataset=Sentences(16),
        tasks="a",
        temperature=(1.0, 0.01),
    )
    trainer.train()
    assert model.bert.pooler.dense.temperature == pytest.approx(0.01)
    decayed = trainer.get_decay_parameter_names(model)
    assert "bert.pooler.dense.weight" in decayed and not [name for name in decayed if "masks" in name]


def test_saved_model_comes_back(tmp_path):
    model = bert()
    trainer = TaskTrainer(model, _arguments(tmp_path, num_train_epochs=1), train_dataset=Sentences(16), tasks=["a"])
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    from safetensors.torch import load_file

    again = bert(("a",))
    again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    words = Sentences(4).words
    with torch.no_grad(), mm.using_task(model, "a"), mm.using_task(again, "a"):
        torch.testing.assert_close(again.eval()(input_ids=words).logits, model.eval()(input_ids=words).logits, rtol=0, atol=0)


class Failing(TaskTrainer):
    def compute_loss(self, *arguments, **options):
        raise FloatingPointError("the loss is nan")


def test_no_block_is_left_open_by_an_error(tmp_path):
    model = bert()
    trainer = Failing(model, _arguments(tmp_path), train_dataset=Sentences(16), eval_dataset=Sentences(8), tasks=["a"])
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(FloatingPointError):
            call()
        _closed(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "either tasks or task_column must be given, got tasks=None and task_column=None"),
        ({"tasks": "a", "task_column": "task"}, ValueError, "either tasks or task_column must be given"),
        ({"tasks": []}, ValueError, "tasks must name at least one task"),
        ({"tasks": "a", "evaluate": 3}, TypeError, "task name must be a string, got int"),
        ({"tasks": "a", "temperature": (0.0, 1.0)}, ValueError, "temperature must be positive"),
    ],
)
def test_refused(tmp_path, options, error, message):
    model = bert()
    with pytest.raises(error, match=message):
        TaskTrainer(model, _arguments(tmp_path), **options)
    assert mm.tasks(model) == ["default"]
