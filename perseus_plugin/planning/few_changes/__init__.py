"""Plans with few clock changes."""
