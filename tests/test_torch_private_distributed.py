"""torch's private symbols of its distributed wrappers: each one that metamask_ext uses does what is needed of it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist
from support.pins import pins
from torch import nn

GROUPS = "a task is added to a model that fully_shard holds"


@pytest.fixture
def _alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pins("torch.distributed.fsdp.FSDPModule._get_fsdp_state", GROUPS)
@pins("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._fsdp_param_groups", GROUPS)
@pins("torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam._module_info", GROUPS)
@pins("torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam._unsharded_dtensor_spec", GROUPS)
def test_groups_of_fully_shard():
    from torch.distributed.fsdp import fully_shard

    from metamask_ext.torch_private import fsdp_places

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return sum(x * parameter for parameter in self.parameters())

    model = fully_shard(Layer())
    model(torch.ones(3)).sum().backward()
    model.reshard()
    place = fsdp_places(model)[model, "first"]
    assert place.trained_dtypes() == {torch.float32}
    place.add(model, "second", torch.full((3,), 2.0))
    assert hasattr(model.second, "device_mesh") and fsdp_places(model).keys() == {(model, "first"), (model, "second")}
    y = model(torch.ones(3))
    assert torch.equal(y.detach(), torch.full((3,), 3.0))
    y.sum().backward()
    assert torch.equal(model.second.grad.full_tensor(), torch.ones(3))
    place.remove(model, "second")
    assert fsdp_places(model).keys() == {(model, "first")}


@pytest.mark.usefixtures("_alone")
@pins("torch.distributed.tensor.distribute_module", "the partition of a layer is not applied to the holders of its masks")
def test_distribute_module_walks_through_a_module():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from metamask_ext.torch_private import distributes

    asked = []

    class Asked(nn.Linear):
        def named_modules(self, *arguments, **options):
            asked.append(distributes(sys._getframe(1)))
            return super().named_modules(*arguments, **options)

    for style in (ColwiseParallel(), RowwiseParallel()):
        asked.clear()
        parallelize_module(Asked(2, 2), init_device_mesh("cpu", (1,)), style)
        assert asked.count(True) == 1


@pytest.mark.usefixtures("_alone")
@pins("torch.nn.parallel.DistributedDataParallel.__init__", "layers below a static graph refuse other tasks than the first step's")
def test_constructor_of_a_static_graph():
    from torch.nn.modules.module import register_module_module_registration_hook

    from metamask_ext.torch_private import wants_static_graph

    seen = []

    def note(module, name, child):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            seen.append(wants_static_graph(sys._getframe(1)))

    handle = register_module_module_registration_hook(note)
    try:
        for static in (False, True):
            nn.parallel.DistributedDataParallel(nn.Linear(1, 1), static_graph=static)
    finally:
        handle.remove()
    assert seen == [False, True] and not wants_static_graph(sys._getframe())


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is no part of the test extra")
@pins("lightning.fabric.wrappers._FabricModule._forward_module", "names of parameters lose the prefixes of wrappers")
def test_wrapper_of_fabric():
    from lightning.fabric import Fabric

    from metamask_ext.nn.paths import plain_path

    model = Fabric(accelerator="cpu", devices=1).setup_module(nn.Sequential(nn.Linear(1, 1)))
    assert [plain_path(model, name) for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
