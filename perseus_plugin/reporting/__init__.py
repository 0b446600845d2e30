"""What a person or a dashboard sees: progress, summary, metrics."""
