"""Masked autoencoders: He et al., arXiv:2111.06377, as homework 9 of EECS 182 sets them."""
