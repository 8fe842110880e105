"""The verbs of the command line, one file each: its options, and the call that they become."""
