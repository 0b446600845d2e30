"""The perseus command."""
