"""Who is slow, and by how much?"""
