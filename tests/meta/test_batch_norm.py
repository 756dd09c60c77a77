"""Batch norms while a meta-learner runs the model: against torch's functions, task by task."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.meta_models import LR, QUERIES, TASKS, assert_same, by_hand, chosen, images, run
from support.models import randomize_masks
from torch import nn

import metamask_ext as mm
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

each_choice = pytest.mark.parametrize("adapt", ["masks", "weights", "all"])


def net(norm=None) -> nn.Sequential:
    norm = nn.BatchNorm2d(3) if norm is None else norm
    model = nn.Sequential(MaskedConv2d(2, 3, 3), norm, nn.Tanh(), nn.Flatten(), MaskedLinear(48, 3))
    for parameter in (norm.weight, norm.bias):
        nn.init.normal_(parameter)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return randomize_masks(model).double()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
@each_choice
def test_batch_statistics(adapt, training):
    model = net().train(training)
    before = buffers(model)
    support, query = images(), images(QUERIES)
    wanted = by_hand(model, chosen(model, adapt), F.cross_entropy, support, query, 2)
    assert_same(MAML(model, LR, 2, adapt)(F.cross_entropy, support, query), wanted, model.parameters())
    torch.testing.assert_close(buffers(model), before, rtol=0.0, atol=0.0)


@each_choice
def test_frozen(adapt):
    model = net()
    before = buffers(model)
    support, query = images(), images(QUERIES)
    maml = MAML(model, LR, 2, adapt, batch_norm="frozen")
    got = maml(F.cross_entropy, support, query)
    norm, frozen = model[1], copy.deepcopy(model)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        frozen[1] = nn.Conv2d(3, 3, 1, groups=3).double()
        frozen[1].weight.copy_(scale[:, None, None, None])
        frozen[1].bias.copy_(norm.bias - norm.running_mean * scale)
    if adapt == "masks":
        wanted = MAML(frozen, LR, 2)(F.cross_entropy, support, query)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        ours, theirs = (
            torch.autograd.grad(loss, [*net[0].parameters(), *net[4].parameters()])
            for loss, net in ((got, model), (wanted, frozen))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    parameters = maml.adapt(F.cross_entropy, support)
    y = maml.predict(parameters, query[0])
    torch.testing.assert_close(maml.predict(parameters, query[0][:, :1]), y[:, :1])
    torch.testing.assert_close(buffers(model), before, rtol=0.0, atol=0.0)


@each_choice
def test_per_task(adapt):
    """Queries take the statistics of their task's support set under the adapted parameters."""
    model = net()
    before = buffers(model)
    support, query = images(), images(QUERIES)
    maml = MAML(model, LR, 2, adapt, batch_norm="per task")
    names = chosen(model, adapt)
    losses = []
    for x, y, query_x, query_y in zip(*support, *query):
        given = dict(model.named_parameters())
        for _ in range(2):
            grads = torch.autograd.grad(
                F.cross_entropy(run(model, given, x), y), [given[name] for name in names], create_graph=True
            )
            given |= {name: given[name] - LR * grad for name, grad in zip(names, grads)}
        variance, mean = torch.var_mean(run(model[:1], given, x), (0, 2, 3), correction=0)
        scale = given["1.weight"] / (variance + model[1].eps).sqrt()
        hidden = run(model[:1], given, query_x) * scale[:, None, None] + (given["1.bias"] - mean * scale)[:, None, None]
        shifted = {f"{int(name[0]) - 2}{name[1:]}": tensor for name, tensor in given.items() if int(name[0]) >= 2}
        losses.append(F.cross_entropy(run(model[2:], shifted, hidden), query_y))
    assert_same(maml(F.cross_entropy, support, query), torch.stack(losses).mean(), model.parameters())
    parameters = maml.adapt(F.cross_entropy, support)
    assert {name: [tensor.shape for tensor in pair] for name, pair in parameters.statistics.items()} == {"1": [(TASKS, 3)] * 2}
    y = maml.predict(parameters, query[0])
    torch.testing.assert_close(maml.predict(parameters, query[0][:, :1]), y[:, :1])
    torch.testing.assert_close(buffers(model), before, rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="a learner does not see"):
        maml.clone()


@pytest.mark.parametrize("policy", ["batch", "per task"])
@each_choice
def test_padding_does_not_count_in_statistics(adapt, policy):
    model = net()
    (x, y), (query_x, query_y) = images(4), images(QUERIES)
    weights = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).double()
    query_weights = torch.tensor([[1.0] * 5, [1.0] * 4 + [0.0], [1.0] * 2 + [0.0] * 3]).double()
    x = torch.where(weights[..., None, None, None] == 0, 1e3, x)
    query_x = torch.where(query_weights[..., None, None, None] == 0, -1e3, query_x)
    maml = MAML(model, LR, 2, adapt, batch_norm=policy)
    losses = []
    for task in range(TASKS):
        n, m = int(weights[task].sum()), int(query_weights[task].sum())
        alone = (x[task : task + 1, :n], y[task : task + 1, :n]), (query_x[task : task + 1, :m], query_y[task : task + 1, :m])
        losses.append(maml(F.cross_entropy, *alone))
    got = maml(F.cross_entropy, (x, y, weights), (query_x, query_y, query_weights))
    assert_same(got, torch.stack(losses).mean(), model.parameters())


@pytest.mark.parametrize("policy", ["batch", "frozen", "per task"])
def test_a_task_batch_norm_is_that_of_the_start(policy):
    """TaskBatchNorm2d: the start's weight, bias and running statistics, else as any batch norm."""
    model = net(TaskBatchNorm2d(3))
    mm.add_task(model, "b", "copy:default")
    plain = net()
    plain[0], plain[4] = copy.deepcopy(model[0]), copy.deepcopy(model[4])
    mm.remove_task(plain[0], "b"), mm.remove_task(plain[4], "b")
    own = model[1].per_task
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            nn.init.uniform_(own[name]["b"], 0.5, 1.5)
            getattr(plain[1], name).copy_(own[name]["b"])
    before = buffers(model)
    support, query = images(), images(QUERIES)
    got = MAML(model, LR, 2, start="b", batch_norm=policy)(F.cross_entropy, support, query)
    wanted = MAML(plain, LR, 2, batch_norm=policy)(F.cross_entropy, support, query)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(got, [model[0].weight, own["weight"]["b"]])
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, [plain[0].weight, plain[1].weight]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(buffers(model), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (6,)), (nn.BatchNorm1d, (3, 6)), (nn.BatchNorm3d, (3, 2, 1, 3))])
@pytest.mark.parametrize("policy", ["batch", "per task"])
def test_other_dimensions(norm, shape, policy):
    """BatchNorm1d with and without a length, BatchNorm3d, without affine part: each task by itself."""
    model = nn.Sequential(norm(shape[0], affine=False), nn.Flatten(), MaskedLinear(torch.Size(shape).numel(), 1)).double()
    x, y = torch.randn(TASKS, 4, *shape).double(), torch.randn(TASKS, 4, 1).double()
    maml = MAML(model, LR, 1, batch_norm=policy)
    each = [maml(F.mse_loss, (x[i : i + 1], y[i : i + 1]), (x[i : i + 1], y[i : i + 1])) for i in range(TASKS)]
    assert_same(maml(F.mse_loss, (x, y), (x, y)), torch.stack(each).mean(), model.parameters())


def test_outside_the_model_is_as_it_was():
    model = net()
    plain = copy.deepcopy(model)
    maml = MAML(model, LR)
    assert isinstance(model[1], nn.BatchNorm2d) and str(model[1])[4:] == str(plain[1])
    x = images()[0][0]
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(buffers(model), buffers(plain))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), model(x))
    copied = copy.deepcopy(maml)
    support, query = images(), images(QUERIES)
    torch.testing.assert_close(copied(F.cross_entropy, support, query), maml(F.cross_entropy, support, query))


def test_what_is_refused():
    with pytest.raises(ValueError, match="batch_norm must be one of 'batch', 'frozen', 'per task', got 'running'"):
        MAML(net(), LR, batch_norm="running")

    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"batch norm must be torch's .* got .*Own.* at '1'"):
        MAML(net(Own(3)), LR)
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), MaskedLinear(4, 1))
    with pytest.raises(ValueError, match="'frozen' needs running statistics, and '0' has none"):
        MAML(model, LR, batch_norm="frozen")
    model = nn.Sequential(MaskedConv2d(2, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True))
    with pytest.raises(ValueError, match="track_running_stats of '1' must be False"):
        MAML(model, LR)
    x, y = torch.randn(2, 1, 4), torch.randn(2, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MAML(nn.Sequential(nn.BatchNorm1d(4), MaskedLinear(4, 1)), LR)(F.mse_loss, (x, y), (x, y))
