"""Encoders on labelled rows: the program, its loss, its run and its score."""
