"""The quickstart's checkpoint and task set, and the scripts that made them."""
