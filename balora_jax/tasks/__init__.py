"""The tasks: one folder each, with what a run computes and scores."""
