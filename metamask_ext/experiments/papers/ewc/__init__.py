"""Elastic weight consolidation: Kirkpatrick et al., arXiv:1612.00796."""
