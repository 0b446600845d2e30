"""What does a person run? One file a command."""
