"""Runs experiments: the run folder, jobs and their processes, settings, tracking, claims, training."""
