"""States of a model that is wrapped or sharded, saved and loaded by one rank, for tests/distributed."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import metamask_ext as mm
from metamask_ext.nn import MaskedLayer

from .distributed_models import net

WRAPS = {"plain": lambda model: model, "DDP": DistributedDataParallel, "FSDP": fully_shard, "compile": torch.compile}
X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def _layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def _annealed(tasks=("b",)):
    model = net(tasks)
    for number, layer in enumerate(_layers(model)):
        layer.temperature = 0.1 + number
    return model


def _outputs(model):
    found = []
    for name in mm.tasks(model):
        with torch.no_grad(), mm.using_task(model, name):
            found.append(model(X))
    return torch.stack(found)


def _difference(model, wanted):
    return (_outputs(model) - _outputs(wanted)).abs().max().item(), [layer.temperature for layer in _layers(model)]


def by_files(rank, folder, saved, loaded):
    """``torch.distributed.checkpoint`` of one wrapper into another, its tasks there already."""
    before, after = WRAPS[saved](_annealed()), WRAPS[loaded](net(("b",)))
    dcp.save(get_model_state_dict(before), checkpoint_id=folder)
    state = get_model_state_dict(after)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(after, state)
    return _difference(after, _annealed())


def by_full_state(rank, saved, loaded, broadcast):
    """A state of whole tensors, in every rank or in rank 0."""
    before, after = WRAPS[saved](_annealed()), WRAPS[loaded](net(("b",)))
    state = get_model_state_dict(before, options=StateDictOptions(full_state_dict=True, cpu_offload=broadcast))
    set_model_state_dict(after, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast))
    return _difference(after, _annealed())


def old_full_state(rank, loaded, broadcast):
    """A state of before the settings were saved."""
    after = WRAPS[loaded](net(("b",)))
    state = {key: value for key, value in _annealed().state_dict().items() if not key.endswith("_extra_state")}
    state = {} if broadcast and rank else state
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        set_model_state_dict(after, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast))
    return [str(warning.message) for warning in noted if "assuming" in str(warning.message)], len(_layers(after))


def a_task_that_the_model_lacks(rank, folder, loaded, full):
    """The error, and the tasks once it was added as the error says."""
    dcp.save(get_model_state_dict(_annealed(("b", "c"))), checkpoint_id=folder)
    whole = _annealed(("b", "c")).state_dict()
    message = None
    for tasks in (("b",), ("b", "c")):
        after = WRAPS[loaded](net(tasks))
        state = get_model_state_dict(after)
        options = None
        if full:
            state, options = dict(whole), StateDictOptions(full_state_dict=True)
        else:
            dcp.load(state, checkpoint_id=folder)
        try:
            set_model_state_dict(after, state, options=options)
        except RuntimeError as error:
            message = str(error)
    return message, _difference(after, _annealed(("b", "c")))


def wrapped_states(rank):
    """A bank and a state of a DistributedDataParallel, in the plain model."""
    wrapper = DistributedDataParallel(_annealed())
    plain = net(("b",))
    plain.load_state_dict(wrapper.module.state_dict())
    own = {key.removeprefix("module."): value for key, value in wrapper.state_dict().items()}
    return own.keys() == plain.state_dict().keys(), _difference(plain, _annealed())


def banks(rank, folder):
    """A bank saved by one rank from a DistributedDataParallel, loaded into a plain model, and into another wrapper."""
    wrapper = DistributedDataParallel(_annealed())
    if rank == 0:
        mm.MaskBank(wrapper).save(folder)
    dist.barrier()
    plain = mm.MaskBank.load(folder, net()).model
    again = mm.MaskBank.load(folder, DistributedDataParallel(net(("b",)))).model
    return _difference(plain, _annealed()), _difference(again, _annealed())
