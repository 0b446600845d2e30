"""What would a plan bring, before there is a job? Pure, but for reading its description."""
