"""What does a person get to see of a job?"""
