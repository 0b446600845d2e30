"""What would a plan have saved in a job that was traced?"""
