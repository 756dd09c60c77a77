"""The common comparison: every method on one problem, and how each learns a new task."""
