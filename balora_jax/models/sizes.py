"""Bounds of the sizes in a model's config: what is larger is a mistake."""

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 2**20, 2**14, 2**13, 2**24, 2**31
