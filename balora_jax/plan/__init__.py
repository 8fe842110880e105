"""Needs of a step before it runs: compiled for devices that need not be here."""
