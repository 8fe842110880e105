"""Many runs of one config: every dataset by every variant by every seed."""
