"""Neural ordinary differential equations: Chen et al., arXiv:1806.07366."""
