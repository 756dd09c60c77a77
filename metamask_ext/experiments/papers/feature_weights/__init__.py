"""Meta-learned weights of features: EECS 182 (Berkeley, fall 2022), homework 9, problem 2, parts a to h."""
