"""The experiments, run by ``metamask run NAME --out DIR --seed S``: of the proposal (Blum and Law, EE5239, 2020) and of papers
around it."""
