"""Causal language models on text: the program, its loss, its run and its score."""
