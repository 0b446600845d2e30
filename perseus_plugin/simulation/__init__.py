"""What if: the saving to expect from a job that has not run, from a profile or from a description of the model."""
