"""What a step needs before it runs: compiled for devices that need not be here."""
