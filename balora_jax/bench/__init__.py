"""How fast and how large is a training step, and what would it cost elsewhere?"""
