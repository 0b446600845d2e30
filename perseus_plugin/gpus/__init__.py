"""How is one GPU spoken to? A protocol, its backends, and the registry that opens them."""
