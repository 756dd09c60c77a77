"""The ops, a folder a family: ``raw`` (the kernels and their shapes), ``reference`` (plain torch), ``autograd`` and ``functional``.

Importing this package registers ``torch.ops.metamask``; a reference build has no kernels and registers nothing.
"""

from metamask_ext._build import BACKEND

if BACKEND != "reference":
    import metamask_ext._C  # noqa: F401  importing it registers the ops
