"""Layers for mixed-task batches: every sample uses its own task's mask."""
