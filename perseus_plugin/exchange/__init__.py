"""How do ranks, and processes beside them, tell each other something? The store, its messages, sockets, processes."""
