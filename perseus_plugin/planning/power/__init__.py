"""How much power may a job draw, and what is the fastest that it allows?"""
