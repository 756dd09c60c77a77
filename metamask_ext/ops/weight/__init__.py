"""``theta = W * g(M)``, of one weight or of a list of them."""
