"""Masked weights for PyTorch, fused: one weight shared by all tasks, one mask per task, ``theta = W * sigmoid(M_task)``."""

from importlib import import_module as _import_module

try:
    _import_module("._build", __name__)
except ModuleNotFoundError as _error:
    raise ImportError(
        "metamask_ext was imported from a source folder in which it is not built. Leave that folder, or build it there with "
        "'pip install --no-build-isolation -e .'"
    ) from _error

from ._info import build_info, check_build

check_build()

from .products import install_default as _install_products

_install_products()

from . import meta, nn, optim
from .bank import MaskBank
from .nn.compile import compile
from .nn.convert import convert
from .nn.merge import merge
from .nn.parameter import mask_parameter
from .nn.report import conversion_report
from .nn.tasks import add_task, remove_task, slots, tasks
from .nn.using_task import using_task
from .ops.conv2d.functional import masked_conv2d
from .ops.linear.functional import masked_linear
from .ops.mixed_task.functional import task_masked_conv2d, task_masked_linear
from .ops.packed.functional import pack_mask, packed_masked_conv2d, packed_masked_linear, unpack_mask
from .ops.weight.functional import masked_weight

__version__ = build_info()["version"]

__all__ = [
    "MaskBank",
    "add_task",
    "build_info",
    "compile",
    "conversion_report",
    "convert",
    "mask_parameter",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "merge",
    "meta",
    "nn",
    "optim",
    "pack_mask",
    "packed_masked_conv2d",
    "packed_masked_linear",
    "remove_task",
    "slots",
    "task_masked_conv2d",
    "task_masked_linear",
    "tasks",
    "unpack_mask",
    "using_task",
]
