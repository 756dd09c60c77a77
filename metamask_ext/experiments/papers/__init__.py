"""Experiments of papers around the proposal."""
