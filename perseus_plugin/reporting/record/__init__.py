"""What a job writes down of its iterations, and how that is read."""
