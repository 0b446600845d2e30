"""How do ranks tell each other something? The store, and the messages in it."""
