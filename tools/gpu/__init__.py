"""The stages of tools/gpu_stages.py: what each does, how it runs, and where its results go."""
