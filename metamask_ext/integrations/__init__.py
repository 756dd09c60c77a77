"""Masked models in other engines: Lightning, transformers' Trainer, Avalanche. Each module needs the package it is named after.

These packages import torchvision where it is installed, and do not know how beside a torch without CUDA: this room does it first.
"""

from metamask_ext.data._torchvision import let_others_import_torchvision

let_others_import_torchvision()
