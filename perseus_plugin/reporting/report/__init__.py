"""What a person opens: a report of a recorded job."""
