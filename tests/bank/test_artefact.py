"""Single tasks in files of their own: without their base, into another bank with the same one, and refused by all others."""

from __future__ import annotations

import copy
import json
import sys
import types

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, using_task
from metamask_ext.bank import BankError, BankNotFoundError
from metamask_ext.files.errors import OutputError
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d


def body(gate="sigmoid", **options) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)),
        MaskedConv2d(1, 2, 3, gate=gate, **options),
        TaskBatchNorm2d(2),
        nn.Flatten(),
        MaskedLinear(2, 5, gate=gate, **options),
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.Linear(4, 2),
    )


def banked(model=None, tasks="ab", packed="a") -> MaskBank:
    bank = MaskBank(body() if model is None else model, per_task="7.*")
    for task in tasks:
        bank.add_task(task)
        with torch.no_grad():
            for name, tensor in bank.model.state_dict(keep_vars=True).items():
                if name.endswith(f".{task}") and tensor.is_floating_point():
                    tensor.normal_().abs_() if "running_var" in name else tensor.normal_()
    for task in packed:
        bank.pack(task)
    bank.model.eval()
    return bank


def run(bank: MaskBank, name: str, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), using_task(bank.model, name):
        return bank.model(x)


def unchanged(model):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]

    def check():
        now = model.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        assert [type(module) for module in model.modules()] == kinds

    return check


X = torch.linspace(-2, 2, 45).reshape(5, 9)


class TestTravelling:
    @pytest.mark.parametrize("task", ["a", "b"])
    def test_into_another_bank_with_the_same_base(self, tmp_path, task):
        bank = banked()
        bank.record(task, accuracy=0.75, loss=1)
        bank.save_task(task, tmp_path / "one")
        other = banked(tasks="z", packed="")
        assert other.load_task(tmp_path / "one") == task
        assert other.load_task(tmp_path / "one", name="again/é") == "again/é"
        assert other.slots == ["default", "z", task, "again/é"]
        for name in (task, "again/é"):
            torch.testing.assert_close(run(other, name, X), run(bank, task, X), rtol=0, atol=0)
            assert other.metrics(name) == {"accuracy": 0.75, "loss": 1.0} and other.is_packed(name) == (task == "a")
        other.save(tmp_path / "bank")
        loaded = MaskBank.load(tmp_path / "bank", body())
        loaded.model.eval()
        torch.testing.assert_close(run(loaded, task, X), run(bank, task, X), rtol=0, atol=0)
        assert loaded.metrics(task) == bank.metrics(task)

    def test_it_holds_no_weight_of_the_base(self, tmp_path):
        bank = banked()
        bank.save_task("a", tmp_path / "a", base="net", card="# hello")
        tensors = safetensors.torch.load_file(tmp_path / "a")
        assert set(tensors) == {
            *("bits/1.weight", "bits/1.bias", "bits/4.weight", "bits/4.bias", "state/7.weight", "state/7.bias"),
            *(f"state/2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        }
        with safe_open(tmp_path / "a", "pt") as opened:
            metadata = opened.metadata()
        assert metadata["name"] == "a" and metadata["base_name"] == "net" and metadata["card"] == "# hello"
        base = json.loads(metadata["base"])
        assert base["1.weight"]["shape"] == [2, 1, 3, 3] and len(metadata["base_sha256"]) == 64
        assert set(base) == {"1.weight", "1.bias", "4.weight", "4.bias", "6.weight", "6.bias"}
        bank.save_task("b", tmp_path / "b")
        with safe_open(tmp_path / "b", "pt") as opened:
            assert opened.metadata()["base_sha256"] == metadata["base_sha256"]
            assert "Sequential" in opened.metadata()["card"] and "logits" in opened.metadata()["card"]

    def test_a_trained_task_goes_on_training(self, tmp_path):
        banked().save_task("b", tmp_path / "b")
        other = banked(tasks="", packed="")
        other.load_task(tmp_path / "b")
        with using_task(other.model, "b"):
            other.model(X).square().sum().backward()
        assert other.model[1].masks["b"].grad is not None

    def test_an_old_file_is_replaced(self, tmp_path):
        bank = banked()
        for task in "ab":
            bank.save_task(task, tmp_path / "one")
        assert banked(tasks="", packed="").load_task(tmp_path / "one") == "b"
        with pytest.raises(OutputError, match="missing"):
            bank.save_task("a", tmp_path / "missing" / "one")
        with pytest.raises(ValueError, match="task must be one of"):
            bank.save_task("zz", tmp_path / "two")

    def test_packed_tasks_do_not_ask_for_the_gates_settings(self, tmp_path):
        bank = banked(body("hard", threshold=0.5))
        bank.save_task("a", tmp_path / "a")
        other = banked(body(temperature=3.0), tasks="", packed="")
        other.load_task(tmp_path / "a")
        torch.testing.assert_close(run(other, "a", X), run(bank, "a", X), rtol=0, atol=0)


class TestOtherDtypes:
    @pytest.mark.parametrize("task", ["a", "b"])
    def test_a_float32_trained_task_in_a_bfloat16_backbone(self, tmp_path, task):
        bank = banked()
        bank.save_task(task, tmp_path / "t")
        other = banked(body().bfloat16(), tasks="", packed="")
        other.load_task(tmp_path / "t")
        masks = other.model[4].masks[task]
        assert masks.dtype == (torch.uint8 if task == "a" else torch.float32) and torch.equal(masks, bank.model[4].masks[task])
        assert other.model[7].per_task["weight"][task].dtype == torch.bfloat16
        wanted = copy.deepcopy(bank.model).bfloat16()
        with torch.no_grad(), using_task(wanted, task):
            torch.testing.assert_close(run(other, task, X.bfloat16()), wanted(X.bfloat16()), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("saved", "loaded"),
        [
            (torch.float32, torch.float16),
            (torch.bfloat16, torch.float32),
            (torch.float64, torch.float32),
            (torch.float64, torch.bfloat16),
            (torch.float32, torch.float64),
        ],
    )
    def test_there_and_back(self, tmp_path, saved, loaded):
        banked(body().to(saved)).save_task("b", tmp_path / "t")
        model = body().to(saved).to(loaded) if loaded == torch.float64 else body().to(loaded)
        other = banked(model, tasks="", packed="")
        other.load_task(tmp_path / "t")
        assert run(other, "b", X.to(loaded)).dtype == loaded

    def test_the_same_numbers_rounded_otherwise_are_another_base(self, tmp_path):
        banked(body().bfloat16()).save_task("a", tmp_path / "t")
        other = banked(body().half(), tasks="", packed="")
        check = unchanged(other.model)
        with pytest.raises(
            BankError, match=r"another base, 'Sequential': the model's '1.bias' is float16, that of the task bfloat16"
        ):
            other.load_task(tmp_path / "t")
        check()
        near = body()
        with torch.no_grad():
            near[6].weight[0, 0] *= 1 + 2**-20  # which bfloat16 cannot tell
        banked().save_task("a", tmp_path / "t")
        with pytest.raises(BankError, match=r"the model's '6.weight' has other values"):
            banked(copy.deepcopy(near), tasks="", packed="").load_task(tmp_path / "t")
        banked(near.bfloat16(), tasks="", packed="").load_task(tmp_path / "t")


class TestRefused:
    """By name, before anything has changed."""

    def refused(self, bank, path, match, error=BankError):
        check = unchanged(bank.model)
        with pytest.raises(error, match=match):
            bank.load_task(path)
        check()

    def test_another_base_says_what_differs(self, tmp_path):
        banked().save_task("b", tmp_path / "t")
        for change, match in (
            (lambda model: model[4].weight.data.add_(1), "'4.weight' has other values"),
            (lambda model: model[6].bias.data.add_(1), "'6.bias' has other values"),
            (lambda model: setattr(model[6], "bias", None), "'6.bias' is missing in the model"),
            (lambda model: model.append(nn.Linear(2, 1)), "the model's '8.weight' is not in it, the model's '8.bias' is not in it"),
            (lambda model: setattr(model, "6", nn.Linear(6, 4)), r"'6.weight' has the shape \[4, 6\], that of the task \[4, 5\]"),
        ):
            other = banked(tasks="", packed="")
            change(other.model)
            self.refused(other, tmp_path / "t", match)

    def test_other_layers_gates_and_names(self, tmp_path):
        banked().save_task("b", tmp_path / "t")
        plain = body()
        plain[4] = mm.merge(nn.Sequential(plain[4]), "default")[0]
        with torch.no_grad():
            plain[4].weight.copy_(body()[4].weight), plain[4].bias.copy_(body()[4].bias)
        self.refused(MaskBank(plain, per_task="7.*"), tmp_path / "t", r"masks the layers \['1', '4'\], the model's .* \['1'\]")
        self.refused(banked(body("hard"), tasks="", packed=""), tmp_path / "t", "has gate 'sigmoid', the model's has 'hard'")
        self.refused(banked(body(temperature=2.0), tasks="", packed=""), tmp_path / "t", "has temperature 1.0, the model's has 2.0")
        self.refused(banked(), tmp_path / "t", "has a task 'b' already")
        self.refused(MaskBank(body()), tmp_path / "t", r"keeps .* per task: MaskBank\(model, per_task")

    def test_damaged_and_foreign_files(self, tmp_path):
        bank, path = banked(), tmp_path / "t"
        bank.save_task("b", path)
        data = path.read_bytes()
        other = banked(tasks="", packed="")
        for place in (3, 9, 40, len(data) // 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            self.refused(other, path, "t: ")
        for cut in (0, 7, 100, len(data) - 1):
            path.write_bytes(data[:cut])
            self.refused(other, path, "damaged")
        bank.save(tmp_path / "bank")
        (task,) = (tmp_path / "bank").glob("tasks/b-*")
        self.refused(other, task, "not the file of a task")
        path.write_bytes(data.replace(b'"metamask_task":"1"', b'"metamask_task":"2"'))
        self.refused(other, path, "format 2, this version of metamask_ext reads format 1")
        self.refused(other, tmp_path / "missing", "missing", FileNotFoundError)

    def test_numbers_that_no_logit_is(self, tmp_path):
        bank = banked()
        with torch.no_grad():
            bank.model[4].masks["b"][0, 0] = torch.nan
        bank.save_task("b", tmp_path / "t")
        self.refused(banked(tasks="", packed=""), tmp_path / "t", "'logits/4.weight' must be finite")


class TestMetrics:
    def test_before_and_after_packing(self, tmp_path):
        bank = banked(packed="")
        bank.record("a", accuracy=0.9, loss=0.5)
        bank.record("a", accuracy=torch.tensor(0.91, dtype=torch.float64))
        bank.pack("a")
        assert bank.metrics("a") == {} and bank.metrics("a", before_packing=True) == {"accuracy": 0.91, "loss": 0.5}
        bank.record("a", accuracy=0.88)
        bank.pack("a")
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, body())
        for each in (bank, loaded):
            assert each.metrics("a") == {"accuracy": 0.88} and each.metrics("a", before_packing=True)["loss"] == 0.5
        loaded.record("a", accuracy=0.5)  # of a task that waits in its file
        loaded.save(tmp_path)
        assert MaskBank.load(tmp_path, body()).metrics("a") == {"accuracy": 0.5}
        assert bank.refresh() == ["a"] and bank.metrics("a") == {"accuracy": 0.5}

    def test_of_a_task_that_waits_in_its_file_and_need_not_be_read(self, tmp_path):
        bank = MaskBank(nn.Sequential(MaskedLinear(3, 2)))
        bank.add_task("a"), bank.pack("a")
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, nn.Sequential(MaskedLinear(3, 2)))
        loaded.record("a", accuracy=0.5)
        loaded.save(tmp_path)
        assert "a" in loaded.model[0].masks._waiting
        assert MaskBank.load(tmp_path, nn.Sequential(MaskedLinear(3, 2))).metrics("a") == {"accuracy": 0.5}

    def test_a_later_task_of_the_same_name_has_none(self, tmp_path):
        bank = banked()
        bank.record("a", accuracy=0.9)
        mm.remove_task(bank.model, "a")
        mm.add_task(bank.model, "a")
        assert bank.metrics("a") == {}
        bank.save(tmp_path)
        assert MaskBank.load(tmp_path, body()).metrics("a") == {}

    @pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), float("inf"), [1], torch.ones(2), 10**400])
    def test_what_is_no_number(self, value):
        bank = banked()
        with pytest.raises((TypeError, ValueError), match="metric 'accuracy' must be"):
            bank.record("a", loss=1.0, accuracy=value)
        assert bank.metrics("a") == {}
        with pytest.raises(ValueError, match="task must be one of"):
            bank.record("zz", accuracy=1.0)


class TestHubLayout:
    def test_a_bank(self, tmp_path):
        bank = banked()
        bank.save_pretrained(tmp_path)
        assert "- a\n- b\n" in (tmp_path / "README.md").read_text()
        loaded = MaskBank.from_pretrained(tmp_path, body(), max_resident=1, pin="a")
        loaded.model.eval()
        torch.testing.assert_close(run(loaded, "a", X), run(bank, "a", X), rtol=0, atol=0)
        (tmp_path / "README.md").write_text("mine")
        bank.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"
        bank.save_pretrained(tmp_path, card="yours")
        assert (tmp_path / "README.md").read_text() == "yours"

    def test_tasks_without_their_base(self, tmp_path):
        bank = banked(tasks=["a", "A", "x/é" * 40])
        bank.record("a", accuracy=0.25)
        bank.save_pretrained(tmp_path, with_base=False, tasks=["a", "A", "x/é" * 40], base="net")
        assert not list(tmp_path.glob("shared-*")) and len(list(tmp_path.glob("*.task.safetensors"))) == 3
        for device in (None, "cpu"):
            loaded = MaskBank.from_pretrained(str(tmp_path), body(), device=device)
            loaded.model.eval()
            assert loaded.tasks == ["default", "a", "A", "x/é" * 40] and {"7.weight", "7.bias"} <= {*loaded.per_task}
            assert loaded.metrics("a") == {"accuracy": 0.25}
            for task in bank.tasks[1:]:
                torch.testing.assert_close(run(loaded, task, X), run(bank, task, X), rtol=0, atol=0)
        MaskBank.from_pretrained(tmp_path, MaskBank(body(), per_task="7.*").model)

    def test_refused_before_the_model_has_changed(self, tmp_path):
        banked().save_pretrained(tmp_path, with_base=False, tasks=["a", "b"])
        other = body()
        with torch.no_grad():
            other[4].weight.add_(1.0)
        taken = banked(tasks="b", packed="").model
        last = sorted(tmp_path.glob("*.task.safetensors"))[-1]
        for model, match in ((other, "'4.weight' has other values"), (taken, "another task 'b'"), (body(), "damaged")):
            if match == "damaged":
                last.write_bytes(last.read_bytes()[:-1] + b"?")
            check = unchanged(model)
            with pytest.raises(BankError, match=match):
                MaskBank.from_pretrained(tmp_path, model)
            check()
        bank = banked()
        with pytest.raises(ValueError, match="task must be one of"):
            bank.save_pretrained(tmp_path, with_base=False, tasks=["zz"])
        with pytest.raises(ValueError, match="tasks must name at least one"):
            bank.save_pretrained(tmp_path, with_base=False, tasks=[])
        with pytest.raises(ValueError, match="tasks must be None with the base"):
            bank.save_pretrained(tmp_path, tasks=["a"])

    @pytest.mark.parametrize(
        "config",
        [b"?", b"[]", b"{}", b'{"metamask_tasks": 2}', b'{"metamask_tasks": 1, "tasks": {"a": "../a.task.safetensors"}}'],
        ids=["no-json", "list", "empty", "version", "path"],
    )
    def test_a_foreign_config(self, tmp_path, config):
        (tmp_path / "config.json").write_bytes(config)
        with pytest.raises(BankError, match=r"config\.json: "):
            MaskBank.from_pretrained(tmp_path, body())

    def test_folders_and_ids_that_are_not_there(self, tmp_path, monkeypatch):
        with pytest.raises(BankNotFoundError, match=r"neither bank\.json nor config\.json"):
            MaskBank.from_pretrained(tmp_path, body())
        for where in (tmp_path / "missing", "missing", "/missing/folder", "a/b/c"):
            with pytest.raises(BankNotFoundError, match="no such folder, and no id"):
                MaskBank.from_pretrained(where, body())
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(BankNotFoundError, match="pip install huggingface_hub"):
            MaskBank.from_pretrained("owner/name", body())
        with pytest.raises(ValueError, match="revision is for a repository"):
            MaskBank.from_pretrained(tmp_path, body(), revision="main")

    def test_an_id_is_downloaded_by_huggingface_hub(self, tmp_path, monkeypatch):
        bank = banked()
        bank.save_pretrained(tmp_path)
        asked = []
        module = types.ModuleType("huggingface_hub")
        module.__spec__ = types.SimpleNamespace()
        module.snapshot_download = lambda where, **options: asked.append((where, options["revision"])) or str(tmp_path)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        assert MaskBank.from_pretrained("owner/name", body(), revision="v1").tasks == bank.tasks
        assert asked == [("owner/name", "v1")]
