"""Gradient descent as a learner beside a recurrent one: Finn and Levine, arXiv:1710.11622."""
