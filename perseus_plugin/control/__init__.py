"""How does a rank set the clock of its GPU? Requests at instruction boundaries, carried out by a helper process."""
