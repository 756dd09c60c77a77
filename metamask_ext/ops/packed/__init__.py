"""Masks of one bit a weight, and layers for mixed-task batches over them."""
