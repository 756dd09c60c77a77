"""``y = conv2d(x, W * g(M)) + b * g(M_b)``."""
