"""What a run computes and scores: one folder per task."""
