"""Supermasks in superposition: Wortsman et al., arXiv:2006.14769."""
