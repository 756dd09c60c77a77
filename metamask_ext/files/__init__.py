"""Files that are whole after a kill at any moment: atomic replacement, locks, checkpoints, metrics.

This is the lowest layer: it imports nothing else of the package.
"""
