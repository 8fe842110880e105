"""How good is the text that a model writes?"""
