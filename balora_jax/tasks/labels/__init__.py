"""Encoders on rows with labels: the program, its loss, its run and its score."""
