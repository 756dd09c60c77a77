"""The ops, a folder a family: ``raw`` (the kernels and their shapes), ``reference`` (plain torch), ``autograd`` and ``functional``.

Importing this package registers ``torch.ops.metamask``; a reference build has no kernels and registers nothing.
"""

from importlib import import_module

from metamask_ext._build import BACKEND

if BACKEND != "reference":
    import_module("metamask_ext._C")  # registers the ops
    import_module(".flops", __name__).register()
