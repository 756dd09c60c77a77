"""MAML against loops written out in plain torch: meta-losses and meta-gradients in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.gpu import DEVICES
from support.meta_models import (
    LR,
    MODELS,
    QUERIES,
    TASKS,
    adapted,
    assert_same,
    by_hand,
    chosen,
    images,
    linear_net,
    on,
    regression,
    run,
)
from support.models import randomize_masks, two_task_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import metamask_ext as mm
from metamask_ext._build import BACKEND
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear

each_device = pytest.mark.parametrize("device", DEVICES)
each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
each_choice = pytest.mark.parametrize("adapt", ["masks", "weights", "all"])


@pytest.mark.every_device(emulated_if=lambda steps, adapt, **_: steps == 2 and adapt != "weights")
@each_device
@each_order
@each_choice
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", MODELS)
def test_meta_gradients_are_those_of_a_loop(kind, steps, adapt, first_order, device):
    make, data, loss_fn = MODELS[kind]
    model = make().double().to(device)
    support, query = on(device, data()), on(device, data(QUERIES))
    maml = MAML(model, LR, steps, adapt, first_order)
    assert maml.adapted_names and set(maml.adapted_names) == set(chosen(model, adapt))
    wanted = by_hand(model, chosen(model, adapt), loss_fn, support, query, steps, first_order)
    assert_same(maml(loss_fn, support, query), wanted, model.parameters())


@each_device
@each_order
@pytest.mark.parametrize("adapt", ["masks", "all"])
def test_learned_rates(adapt, first_order, device):
    model = linear_net().double().to(device)
    support, query = on(device, regression()), on(device, regression(QUERIES))
    maml = MAML(model, LR, 2, adapt, first_order, learn_inner_lr=True)
    assert maml.inner_lr.shape == (len(maml.adapted_names),) and maml.inner_lr in set(maml.parameters())
    with torch.no_grad():
        maml.inner_lr += 0.1 * torch.rand_like(maml.inner_lr)
    wanted = by_hand(model, maml.adapted_names, F.mse_loss, support, query, 2, first_order, maml.inner_lr.unbind())
    assert_same(maml(F.mse_loss, support, query), wanted, maml.parameters())


@each_device
@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize(("kind", "adapt"), [("linear", "masks"), ("cnn", "masks"), ("linear", "all")])
def test_steps_computed_again_give_the_same(kind, adapt, steps, device):
    make, data, loss_fn = MODELS[kind]
    model = make().double().to(device)
    support, query = on(device, data()), on(device, data(QUERIES))
    x = support[0].requires_grad_()
    plain, again = (MAML(model, LR, steps, adapt, learn_inner_lr=True, checkpoint=checkpoint) for checkpoint in (False, True))
    again.inner_lr = plain.inner_lr
    assert_same(again(loss_fn, support, query), plain(loss_fn, support, query), [*plain.parameters(), x])


def test_steps_computed_again_draw_the_same_dropout():
    model = nn.Sequential(MaskedLinear(2, 30), nn.Dropout(0.5), nn.Tanh(), MaskedLinear(30, 1)).double()
    support, query = regression(), regression(QUERIES)
    losses = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        losses.append(MAML(model, LR, 4, checkpoint=checkpoint)(F.mse_loss, support, query))
    state = torch.get_rng_state()
    assert_same(*losses, model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_computed_again_under_autocast():
    model = linear_net()
    (x, y), query = regression(), regression(QUERIES)
    support, query = (x.float(), y.float()), tuple(tensor.float() for tensor in query)
    grads = []
    for checkpoint in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = MAML(model, LR, 2, checkpoint=checkpoint)(F.mse_loss, support, query)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*grads)  # in bfloat16 and in float32 they differ by 1e-2


def test_steps_computed_again_cannot_be_differentiated_again():
    model = linear_net().double()
    loss = MAML(model, LR, 2, checkpoint=True)(F.mse_loss, regression(), regression())
    with pytest.raises(RuntimeError, match=r"checkpoint=True\) cannot be differentiated again"):
        torch.autograd.grad(loss, [model[0].weight], create_graph=True)


def test_a_third_derivative():
    """Of the meta-gradient's norm, as by the loop."""
    model = linear_net().double()
    support, query = regression(), regression(QUERIES)
    names = chosen(model, "masks")
    losses = MAML(model, LR)(F.mse_loss, support, query), by_hand(model, names, F.mse_loss, support, query, 1)
    norms = [
        sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()), create_graph=True)) for loss in losses
    ]
    assert_same(*norms, model.parameters(), 1e-9)


@pytest.mark.skipif(BACKEND == "reference", reason="no kernels")
def test_masks_run_through_the_kernels_and_no_step_loops_over_tasks():
    model = linear_net().double()
    support, query = regression(tasks=17), regression(tasks=17)
    ops = {}
    for adapt in ("masks", "weights", "all"):
        maml = MAML(model, LR, 2, adapt)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            maml(F.mse_loss, support, query).backward()
        ops[adapt] = {event.key: event.count for event in profiler.key_averages()}
    # 3 layers: 3 forwards; their gradients inside 2 steps, and of 3 forwards for the meta-gradient; second derivatives of 2 steps
    for found in ops.values():
        assert found["metamask::task_masked_linear"] == 9
        assert found["metamask::task_masked_linear_backward"] == 6 + 9
        assert found["metamask::task_masked_linear_double_backward"] == 6


def test_adapt_and_predict():
    model = linear_net().double()
    (x, y), (query_x, _) = regression(), regression(QUERIES)
    maml = MAML(model, LR, 2)
    parameters = maml.adapt(F.mse_loss, (x, y))
    assert list(parameters) == maml.adapted_names
    for task in range(TASKS):
        wanted = adapted(model, maml.adapted_names, F.mse_loss, x[task], y[task], 2)
        for name, tensor in parameters.items():
            torch.testing.assert_close(tensor[task], wanted[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(maml.predict(parameters, query_x)[task], run(model, wanted, query_x[task]))
    assert all(parameter.grad is None for parameter in model.parameters())
    # In two parts, without a graph
    with torch.no_grad():
        half = maml.adapt(F.mse_loss, (x, y), steps=1)
        whole = maml.adapt(F.mse_loss, (x, y), steps=1, parameters=half)
    for name, tensor in whole.items():
        assert not tensor.requires_grad and not half[name].requires_grad
        torch.testing.assert_close(tensor, parameters[name].detach(), rtol=1e-12, atol=1e-12)
    none = maml.adapt(F.mse_loss, (x, y), steps=0)
    torch.testing.assert_close(maml.predict(none, query_x), model(query_x))


@pytest.mark.parametrize("adapt", ["masks", "weights"])
def test_what_does_not_require_grad_is_adapted_and_not_meta_learned(adapt):
    model = linear_net().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in chosen(model, adapt))
    support, query = regression(), regression(QUERIES)
    loss = MAML(model, LR, 2, adapt)(F.mse_loss, support, query)
    assert all(parameter.grad is None for parameter in model.parameters())
    copied = copy.deepcopy(model).requires_grad_()
    wanted = by_hand(copied, chosen(model, adapt), F.mse_loss, support, query, 2)
    loss.backward()
    grads = torch.autograd.grad(wanted, list(copied.parameters()))
    for (name, parameter), grad in zip(model.named_parameters(), grads):
        if name in chosen(model, adapt):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-10)


def test_a_function_says_what_is_adapted():
    model = linear_net().double()
    support, query = regression(), regression(QUERIES)
    for names, mixed in ((["4.masks.default"], True), (["0.bias_masks.default", "2.masks.default"], True), (["4.weight"], False)):
        maml = MAML(model, LR, 2, lambda name, names=names: name in names)
        assert maml.adapted_names == names and maml._adapted.mixed is mixed
        assert_same(maml(F.mse_loss, support, query), by_hand(model, names, F.mse_loss, support, query, 2), model.parameters())


def test_a_model_without_masks():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    support, query = regression(), regression(QUERIES)
    wanted = by_hand(model, chosen(model, "weights"), F.mse_loss, support, query, 2)
    for adapt in ("weights", "all"):
        assert_same(MAML(model, LR, 2, adapt)(F.mse_loss, support, query), wanted, model.parameters())


def test_layers_that_share_a_mask():
    """Two layers with one weight and one mask: what is adapted once counts in both."""
    layer = MaskedLinear(2, 2)
    model = randomize_masks(nn.Sequential(layer, nn.Tanh(), MaskedLinear(2, 2), nn.Tanh(), MaskedLinear(2, 1))).double()
    model[2].weight, model[2].masks = layer.weight, layer.masks
    support, query = regression(), regression(QUERIES)

    def tied(given):
        return {**given, "2.weight": given["0.weight"], "2.masks.default": given["0.masks.default"]}

    losses = []
    for x, y, query_x, query_y in zip(*support, *query):
        given = dict(model.named_parameters())
        names = [name for name in given if "masks" in name]
        grads = torch.autograd.grad(F.mse_loss(run(model, tied(given), x), y), [given[name] for name in names], create_graph=True)
        given |= {name: given[name] - LR * grad for name, grad in zip(names, grads)}
        losses.append(F.mse_loss(run(model, tied(given), query_x), query_y))
    maml = MAML(model, LR)
    assert maml.adapted_names == names
    assert_same(maml(F.mse_loss, support, query), torch.stack(losses).mean(), model.parameters())


@pytest.mark.parametrize("adapt", ["masks", "weights", "all"])
def test_a_model_with_several_tasks_starts_where_it_is_told(adapt):
    make = two_task_model(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1), tasks=("a", "b")).double()
    support, query = regression(), regression(QUERIES)
    single = nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1)).double()
    for layer, one in ((make[0], single[0]), (make[2], single[2])):
        one.weight, one.bias = layer.weight, layer.bias
        one.masks["default"], one.bias_masks["default"] = layer.masks["b"], layer.bias_masks["b"]
    got = MAML(make, LR, 2, adapt, start="b")(F.mse_loss, support, query)
    assert_same(got, MAML(single, LR, 2, adapt)(F.mse_loss, support, query), single.parameters())
    with mm.using_task(make, "a"):  # a block around does not change where it starts
        again = MAML(make, LR, 2, adapt, start="b")(F.mse_loss, support, query)
    torch.testing.assert_close(again, got)


@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
@pytest.mark.parametrize("packed", [False, True])
def test_start_from_a_superposition_of_known_masks(gate, packed):
    """As add_task starts a task there; and coefficients and known masks get gradients."""
    layers = [MaskedLinear(2, 6, gate=gate), nn.Tanh(), MaskedLinear(6, 1, gate=gate)]
    model = two_task_model(*layers).double()
    bank = mm.MaskBank(model)
    if packed:
        bank.pack("a")
    support, query = regression(), regression(QUERIES)
    alphas = {"a": torch.tensor(0.7, dtype=torch.float64, requires_grad=True), "b": 0.4}
    maml = MAML(model, LR, 2, start=alphas)
    assert maml.adapted_names == ["0.masks", "0.bias_masks", "2.masks", "2.bias_masks"]
    loss = maml(F.mse_loss, support, query)
    bank.add_task("new", {"a": 0.7, "b": 0.4})
    torch.testing.assert_close(loss, MAML(model, LR, 2, start="new")(F.mse_loss, support, query), rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, [alphas["a"], model[0].weight, model[0].masks["b"]])
    assert all(grad.abs().max() > 0 for grad in grads)
    with torch.no_grad():
        near = []
        for step in (1e-6, -1e-6) if gate == "sigmoid" else ():
            near.append(MAML(model, LR, 2, start={"a": 0.7 + step, "b": 0.4})(F.mse_loss, support, query))
    if near:
        torch.testing.assert_close(grads[0], (near[0] - near[1]) / 2e-6, rtol=1e-6, atol=1e-9)
    # With weights adapted, the mixture itself is used.
    with bank.superpose({"a": 0.7, "b": 0.4}):
        wanted = F.mse_loss(model(query[0]), query[1])
    got = MAML(model, LR, 0, "weights", start=alphas)(F.mse_loss, support, query)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_head_for_each_task():
    """A tensor that belongs to tasks beside the masks begins as that of the start, and is adapted as a weight."""
    model = nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    bank = mm.MaskBank(model, per_task="2.*")
    bank.add_task("b")
    support, query = regression(), regression(QUERIES)
    plain = nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    plain.load_state_dict(mm.merge(model, "b").state_dict(), strict=True)
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
        plain[0].masks["default"].copy_(model[0].masks["b"])
        plain[0].bias_masks["default"].copy_(model[0].bias_masks["b"])
    for adapt in ("masks", "weights", "all"):
        maml = MAML(model, LR, 2, adapt, start="b")
        assert not any(name.endswith("default") for name in maml.adapted_names)
        got = maml(F.mse_loss, support, query)
        wanted = MAML(plain, LR, 2, adapt)(F.mse_loss, support, query)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(got, [model[0].weight, model[2].per_task["weight"]["b"]])
        torch.testing.assert_close(grads, torch.autograd.grad(wanted, [plain[0].weight, plain[2].weight]), rtol=1e-10, atol=1e-10)


def test_a_model_whose_code_reads_a_masked_weight():
    """MultiheadAttention reads that of its out_proj: such a model runs task by task under vmap, with the same numbers."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0]).mean(1)

    model = mm.convert(Attention(), mask_init="normal").double()
    for bias in (model.attention.out_proj._parameters["bias"], model.attention._parameters["in_proj_bias"]):
        nn.init.normal_(bias)  # 0 has no use for a mask
    maml = MAML(model, LR, 2)
    assert not maml._adapted.mixed and "attention.out_proj.masks.default" in maml.adapted_names
    x, y = torch.randn(TASKS, 5, 3, 4, dtype=torch.float64), torch.randn(TASKS, 5, 1, dtype=torch.float64)
    losses = []
    for task in range(TASKS):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.mse_loss(learner(x[task]), y[task]))
        losses.append(F.mse_loss(learner(x[task]), y[task]))
    shared = [parameter for name, parameter in model.named_parameters() if "masks" in name]
    assert_same(maml(F.mse_loss, (x, y), (x, y)), torch.stack(losses).mean(), shared)


@each_order
@each_choice
def test_a_learner_is_one_task(adapt, first_order):
    model = linear_net().double()
    support, query = regression(), regression(QUERIES)
    maml = MAML(model, LR, 1, adapt, first_order, learn_inner_lr=True)
    losses = []
    for x, y, query_x, query_y in zip(*support, *query):
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(F.mse_loss(learner(x), y))
        losses.append(F.mse_loss(learner(query_x), query_y))
    maml.inner_steps = 3
    assert_same(maml(F.mse_loss, support, query), torch.stack(losses).mean(), maml.parameters())


def test_dropout_draws_for_each_task_by_itself():
    model = nn.Sequential(MaskedLinear(2, 400), nn.Dropout(0.5), MaskedLinear(400, 1)).double()
    x = torch.ones(2, 3, 2, dtype=torch.float64)
    for adapt in ("masks", "weights"):
        maml = MAML(model, LR, 0, adapt)
        parameters = maml.adapt(F.mse_loss, (x, torch.ones(2, 3, 1)))
        y = maml.predict(parameters, x).flatten()
        assert len(y.unique()) == 6
        torch.testing.assert_close(maml.eval().predict(parameters, x).flatten().unique().numel(), 1)
        maml.train()


def test_a_copy_adapts_the_copy():
    model = linear_net().double()
    maml = MAML(model, LR, 2, learn_inner_lr=True)
    copied = copy.deepcopy(maml)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    support, query = regression(), regression(QUERIES)
    wanted = by_hand(copied.model, maml.adapted_names, F.mse_loss, support, query, 2, False, [1.5 * LR] * len(maml.adapted_names))
    assert_same(copied(F.mse_loss, support, query), wanted, copied.model.parameters())
    maml.load_state_dict(copied.state_dict())
    torch.testing.assert_close(maml(F.mse_loss, support, query), wanted, rtol=1e-12, atol=1e-12)


def test_images_of_several_sizes_of_sets():
    """Sets padded with weight 0 give what the sets alone give, whatever stands in the padding."""
    make, _, loss_fn = MODELS["cnn"]
    model = make().double()
    (x, y), (query_x, query_y) = images(4), images(QUERIES)
    counts, query_counts = (4, 2, 1), (3, 5, 2)
    sets = []
    for tensor, sizes in ((x, counts), (y, counts), (query_x, query_counts), (query_y, query_counts)):
        sets.append([entry[:size] for entry, size in zip(tensor, sizes)])
    wanted = by_hand(model, chosen(model, "masks"), loss_fn, sets[:2], sets[2:], 3)
    weights, query_weights = (
        (torch.arange(size)[None] < torch.tensor(sizes)[:, None]).double() for size, sizes in ((4, counts), (QUERIES, query_counts))
    )
    x = torch.where(weights[..., None, None, None] == 0, 1e3, x)
    query_x = torch.where(query_weights[..., None, None, None] == 0, -1e3, query_x)
    support, query = (x, y, weights), (query_x, query_y, query_weights)
    assert_same(MAML(model, LR, 3)(loss_fn, support, query), wanted, model.parameters())
    names = chosen(model, "weights")
    wanted = by_hand(model, names, loss_fn, sets[:2], sets[2:], 2)
    assert_same(MAML(model, LR, 2, "weights")(loss_fn, support, query), wanted, model.parameters())
    assert_same(MAML(model, LR, 2, "weights", checkpoint=True)(loss_fn, support, query), wanted, model.parameters())


# --- What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapt": "mask"}, ValueError, "adapt must be 'masks', 'weights', 'all' or a function .* got 'mask'"),
        ({"adapt": lambda name: False}, ValueError, "adapt selects no parameter of Sequential"),
        ({"inner_steps": -1}, ValueError, "inner_steps must be an integer of at least 0, got -1"),
        ({"inner_steps": 1.0}, ValueError, r"inner_steps must be an integer of at least 0, got 1\.0"),
        ({"start": "c"}, ValueError, "start must be one of the tasks 'a', 'b', or several with coefficients, got 'c'"),
        ({"start": None}, ValueError, "start must be one of the tasks 'a', 'b', .* got None"),
        ({"start": {"c": 1.0}}, ValueError, "start must name tasks among 'a', 'b', got 'c'"),
        ({"start": {}}, ValueError, "start must name at least one task"),
    ],
)
def test_arguments_of_maml(options, error, message):
    model = two_task_model(MaskedLinear(2, 1))
    with pytest.raises(error, match=message):
        MAML(model, LR, **{"start": "a", **options})


def test_models_that_do_not_fit():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        MAML(F.relu, LR)
    with pytest.raises(ValueError, match="adapt selects no parameter of Linear, got 'masks'"):
        MAML(nn.Linear(2, 1), LR)
    with pytest.raises(ValueError, match="start needs a model with masked layers, got Linear"):
        MAML(nn.Linear(2, 1), LR, adapt="all", start="a")
    bank = mm.MaskBank(two_task_model(MaskedLinear(2, 1)))
    bank.pack("a")
    with pytest.raises(ValueError, match=r"the masks of task 'a' are packed, .* use start=\{'a': 1\.0\}"):
        MAML(bank.model, LR, start="a")
    headed = mm.MaskBank(two_task_model(MaskedLinear(2, 2), nn.Linear(2, 1)), per_task="1.*").model
    with pytest.raises(
        ValueError, match=r"adapt must not select what start combines from several tasks, got '1\.per_task\.weight\.a'"
    ):
        MAML(headed, LR, adapt="all", start={"a": 0.5, "b": 0.5})


GOOD = torch.zeros(3, 4, 2), torch.zeros(3, 4, 1)


@pytest.mark.parametrize(
    ("support", "query", "error", "message"),
    [
        (GOOD[0], GOOD, TypeError, r"support must be \(x, y\) or \(x, y, weights\), got Tensor"),
        (GOOD, (GOOD[0],), TypeError, "query must be"),
        (([1.0], GOOD[1]), GOOD, TypeError, "x of support must be a tensor, got list"),
        ((GOOD[0][0, 0], GOOD[1]), GOOD, ValueError, r"x of support must be \[T, K, \.\.\.\] .* got shape \[2\]"),
        ((GOOD[0][:0], GOOD[1][:0]), GOOD, ValueError, "at least one task and sample"),
        (
            (GOOD[0], GOOD[1][:, :3]),
            GOOD,
            ValueError,
            r"y of support must be \[T, K, \.\.\.\] = \[3, 4\] as x, got shape \[3, 3, 1\]",
        ),
        (GOOD, (GOOD[0][:2], GOOD[1][:2]), ValueError, "query must have the tasks of support, 3, got 2"),
        ((*GOOD, torch.ones(3)), GOOD, ValueError, r"weights of support must be \[T, K\] = \[3, 4\], got shape \[3\]"),
        ((*GOOD, torch.ones(3, 4).bool()), GOOD, TypeError, r"weights of support must be a floating-point tensor, got torch\.bool"),
        (GOOD, (*GOOD, torch.zeros(3, 4)), ValueError, "weights of query must not be negative, and not all zero for a task"),
        ((*GOOD, -torch.ones(3, 4)), GOOD, ValueError, "weights of support must not be negative"),
    ],
)
def test_sets_that_do_not_fit(support, query, error, message):
    maml = MAML(linear_net(), LR)
    with pytest.raises(error, match=message):
        maml(F.mse_loss, support, query)


def test_losses_and_models_that_do_not_fit():
    maml = MAML(linear_net(), LR)
    with pytest.raises(ValueError, match=r"loss_fn must give a scalar for one task, got shape \[4, 1\]"):
        maml(lambda a, b: (a - b).square(), GOOD, GOOD)
    with pytest.raises(ValueError, match=r"loss_fn must give a scalar for one task, got shape \[1, 1\]"):
        maml(lambda a, b: (a - b).square(), (*GOOD, torch.ones(3, 4)), GOOD)
    model = linear_net()
    model.forward = lambda x, model=model: model[:4](x)
    with pytest.raises(
        ValueError, match=r"adapt selects '4\.masks\.default', '4\.bias_masks\.default', on which the loss does not"
    ):
        MAML(model, LR)(lambda y, target: y.square().mean(), GOOD, GOOD)
    model = linear_net()
    model.forward = lambda x: model[2:](model[:2](x).reshape(-1, 2, 6))
    with pytest.raises(RuntimeError, match="MaskedLinear was called with 6 samples while 12 of several tasks are run as one batch"):
        MAML(model, LR)(F.mse_loss, GOOD, GOOD)
    other = linear_net()
    other.forward = lambda x: other[:](x).mean(0)
    with pytest.raises(RuntimeError, match=r"must give a tensor with an entry for each of its 12 samples, got shape \[1\]"):
        MAML(other, LR)(F.mse_loss, GOOD, GOOD)
    parameters = maml.adapt(F.mse_loss, GOOD)
    with pytest.raises(ValueError, match="x must have the tasks of parameters, 3, got 2"):
        maml.predict(parameters, GOOD[0][:2])
    with pytest.raises(TypeError, match="parameters must be what adapt gave, got dict"):
        maml.predict(dict(parameters), GOOD[0])
    with pytest.raises(TypeError, match="parameters must be what adapt gave"):
        MAML(linear_net(), LR, adapt="weights").predict(parameters, GOOD[0])
    with pytest.raises(ValueError, match="support must have the tasks of parameters, 3, got 2"):
        maml.adapt(F.mse_loss, (GOOD[0][:2], GOOD[1][:2]), parameters=parameters)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got True"):
        maml.adapt(F.mse_loss, GOOD, steps=True)
