"""What does an instruction use? From readings of a counter to energies. Pure."""
