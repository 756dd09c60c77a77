"""Files that a kill at any moment leaves whole: atomic writes, checkpoints, metrics, locks."""
