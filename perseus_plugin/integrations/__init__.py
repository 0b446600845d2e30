"""How is a framework hooked? No policy here."""
