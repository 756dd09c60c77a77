"""The experiments of C. Blum and A. Law, EE5239 project proposal (2020), section by section."""
