"""metamask_ext.compile of a MAML: a meta-step, second order included, is one graph, with the numbers of loops written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.meta_models import LR, MODELS, QUERIES, assert_same, by_hand, chosen, linear_net, regression
from support.models import two_task_model
from torch import nn

import metamask_ext as mm
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv1d, MaskedConv2d, MaskedConvTranspose2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.per_task import keep_per_task

pytestmark = pytest.mark.once
each_choice = pytest.mark.parametrize("adapt", ["masks", "weights", "all"])


class Graphs(list):
    """A backend that keeps the graphs."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward


def compiled(maml, **options):
    return mm.compile(maml, **{"backend": "aot_eager", "fullgraph": True} | options)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        all_backends = ["eager", "aot_eager", "inductor"]
        metafunc.parametrize("backend", all_backends if metafunc.config.option.inductor else all_backends[:2])


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@each_choice
@pytest.mark.parametrize("kind", MODELS)
def test_meta_gradients_are_those_of_a_loop(kind, adapt, first_order, backend):
    make, data, loss_fn = MODELS[kind]
    model = make().double()
    support, query = data(), data(QUERIES)
    maml = compiled(MAML(model, LR, 2, adapt, first_order), backend=backend)
    wanted = by_hand(model, chosen(model, adapt), loss_fn, support, query, 2, first_order)
    assert_same(maml(loss_fn, support, query), wanted, model.parameters())


def norms():
    return nn.Sequential(MaskedConv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), MaskedLinear(64, 1))


def task_norms():
    return nn.Sequential(MaskedConv2d(1, 4, 3, padding=1), TaskBatchNorm2d(4), nn.Flatten(), MaskedLinear(64, 1))


def headed():
    model = nn.Sequential(MaskedLinear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    keep_per_task(model[2], ["weight", "bias"])
    return nn.Sequential(nn.Flatten(), model)


@each_choice
@pytest.mark.parametrize("policy", ["batch", "per task", "frozen"])
@pytest.mark.parametrize("make", [norms, task_norms, headed], ids=lambda make: make.__name__)
def test_norms_heads_and_weighted_samples_are_those_of_eager_mode(make, policy, adapt):
    torch.manual_seed(0)
    model = make().double()
    x, y, query_x, query_y = (torch.randn(3, 5, *shape).double() for shape in ((1, 4, 4), (1,), (1, 4, 4), (1,)))
    weights = torch.rand(3, 5).double() + 0.1
    support, query = (x, y, weights), (query_x, query_y)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mamls = compiled(maml_of(model, adapt, policy)), maml_of(model, adapt, policy)
    losses = [maml(F.mse_loss, support, query) for maml in mamls]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert sum(bool(grad.abs().max() > 1e-6) for grad in grads[0]) >= 4
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], msg=name)


@each_choice
def test_other_masked_layers(adapt):
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedConv1d(2, 3, 2), nn.Tanh(), nn.Unflatten(2, (1, 3)), MaskedConvTranspose2d(3, 2, (1, 2), bias=False)
    )
    model = model.append(nn.Flatten()).append(MaskedLinear(8, 1)).double()
    support, query = ((torch.randn(2, 4, 2, 4).double(), torch.randn(2, 4, 1).double()) for _ in range(2))
    losses = [maml(F.mse_loss, support, query) for maml in (compiled(MAML(model, LR, 1, adapt)), MAML(model, LR, 1, adapt))]
    assert_same(*losses, model.parameters())


def maml_of(model, adapt, policy):
    return MAML(model, 0.1, 2, adapt, batch_norm=policy)


def test_large_images_run_one_task_after_another():
    model = nn.Sequential(MaskedConv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), MaskedLinear(72, 3)).double()
    support, query = ((torch.randn(2, 20, 1, 24, 24).double(), torch.arange(20).expand(2, 20) % 3) for _ in range(2))
    maml = MAML(model, LR, 1)
    assert maml._adapted.runs_each(support[0])
    wanted = by_hand(model, chosen(model, "masks"), F.cross_entropy, support, query, 1)
    assert_same(compiled(maml)(F.cross_entropy, support, query), wanted, model.parameters())


def test_it_is_one_graph_and_follows_the_parameters():
    model = linear_net().double()
    graphs = Graphs()
    maml = compiled(MAML(model, LR, 1, learn_inner_lr=True), backend=graphs)
    plain = MAML(model, LR, 1, learn_inner_lr=True)
    plain.inner_lr = maml.inner_lr
    for _ in range(3):
        support, query = regression(), regression(QUERIES)
        assert_same(maml(F.mse_loss, support, query), plain(F.mse_loss, support, query), maml.parameters())
        with torch.no_grad():
            for parameter in maml.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
    assert len(graphs) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_starts_of_models_with_several_tasks(packed):
    model = two_task_model(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1)).double()
    support, query = regression(), regression(QUERIES)
    if packed:
        mm.MaskBank(model).pack("a")
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for options in ({"start": {"a": alpha, "b": 0.4}}, {"start": "b"}, {"start": "a", "adapt": "weights"}):
        losses = [
            each(F.mse_loss, support, query) for each in (compiled(MAML(model, LR, 2, **options)), MAML(model, LR, 2, **options))
        ]
        grads = [torch.autograd.grad(loss, [*model.parameters(), alpha], allow_unused=True) for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(*([torch.zeros(()) if g is None else g for g in some] for some in grads), rtol=1e-10, atol=1e-10)


def test_dropout_draws_and_other_calls_are_not_compiled():
    model = nn.Sequential(MaskedLinear(2, 50), nn.Dropout(0.5), MaskedLinear(50, 1)).double()
    maml = compiled(MAML(model, LR, 1))
    support, query = regression(), regression(QUERIES)
    assert maml(F.mse_loss, support, query) != maml(F.mse_loss, support, query)
    maml.eval()
    plain = MAML(model, LR, 1)
    torch.testing.assert_close(maml(F.mse_loss, support, query), plain(F.mse_loss, support, query))
    torch.testing.assert_close(dict(maml.adapt(F.mse_loss, support)), dict(plain.adapt(F.mse_loss, support)))
    with torch.inference_mode():
        torch.testing.assert_close(maml(F.mse_loss, support, query), plain(F.mse_loss, support, query))


def test_compile_of_the_module_is_the_same():
    model = linear_net().double()
    graphs = Graphs()
    maml = MAML(model, LR, 1)
    maml.compile(backend=graphs, fullgraph=True)
    maml(F.mse_loss, regression(), regression(QUERIES))
    assert len(graphs) == 1


# --- What is refused.


def test_what_is_not_compiled_says_so():
    model = two_task_model(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1)).double()
    with pytest.raises(ValueError, match=r"checkpoint=True is not compiled: .* Compile a MAML with checkpoint=False"):
        mm.compile(MAML(model, LR, checkpoint=True, start="a"))
    with pytest.raises(
        ValueError, match="starts from several tasks is compiled where all masks are adapted, and MaskedLinear would"
    ):
        mm.compile(MAML(model, LR, adapt="weights", start={"a": 0.5, "b": 0.5}))


def test_errors_are_those_of_eager_mode():
    model = nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1)).double()
    model.append(nn.Identity())
    (x, y), (query_x, query_y) = regression(), regression(QUERIES)
    maml = compiled(MAML(model, LR, 1))
    for loss_fn, support, query in (
        (lambda prediction, target: (prediction * 0).detach().mean() + target.mean().requires_grad_(), (x, y), (query_x, query_y)),
        (lambda prediction, target: prediction - target, (x, y), (query_x, query_y)),
        (F.mse_loss, (x, y), (query_x[:2], query_y[:2])),
        (F.mse_loss, (x, y[:, :2]), (query_x, query_y)),
        (F.mse_loss, (x[..., :1], y), (query_x, query_y)),
    ):
        with pytest.raises(Exception) as wanted:
            maml._call_impl(loss_fn, support, query)
        with pytest.raises(type(wanted.value)) as got:
            maml(loss_fn, support, query)
        assert str(got.value).splitlines()[0] == str(wanted.value).splitlines()[0]


def test_a_compiled_meta_gradient_cannot_be_differentiated_again():
    """AOTAutograd's refusal; eager mode gives third derivatives."""
    model = linear_net().double()
    maml = compiled(MAML(model, LR, 1))
    loss = maml(F.mse_loss, regression(), regression(QUERIES))
    grads = torch.autograd.grad(loss, [model[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grads[0].sum().backward()
