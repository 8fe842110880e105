"""Programs behind single tables of measurements, each run with `python -m`."""
