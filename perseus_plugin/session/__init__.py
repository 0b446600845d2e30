"""What runs on every rank while a job trains?"""
