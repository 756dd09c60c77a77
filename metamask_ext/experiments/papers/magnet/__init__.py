"""Magnet loss: Rippel, Paluri, Dollar and Bourdev, arXiv:1511.05939."""
