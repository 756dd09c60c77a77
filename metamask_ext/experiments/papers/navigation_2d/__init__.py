"""MAML for policies that walk to a goal they are not told: Finn, Abbeel and Levine, arXiv:1703.03400, section 5.3."""
