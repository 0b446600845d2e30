"""How do several jobs keep one power budget?"""
