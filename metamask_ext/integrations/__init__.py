"""Masked models in other engines: Lightning, transformers' Trainer, Avalanche. Each module needs the package it is named after."""
