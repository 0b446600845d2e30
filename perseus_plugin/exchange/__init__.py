"""How do ranks, and the processes beside them, tell each other something? The store, its messages, sockets, processes."""
