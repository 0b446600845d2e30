"""How long does an instruction take, and how much energy, at each clock? From a sweep to a profile."""
