"""What does rank 0 decide for all?"""
