"""Text files to batches: rows (sources), tokens (examples), arrays (batches)."""

from absl import logging

# What grain says while it loads would stand before the one sentence of an error.
logging.get_absl_logger().addFilter(
    lambda record: "Grain multiprocess worker profiling" not in record.getMessage()
)
