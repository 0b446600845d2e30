"""What is one training iteration? Its instructions, their dependencies, what it runs at, what was seen of it. Pure."""
