"""Adapters from a framework's events to session calls. No policy lives here."""
