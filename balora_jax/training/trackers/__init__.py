"""Further places for the rows of a run's log: one tracker a file, each an object under its name.

``tracker.py`` says what a tracker is. ``metrics.jsonl`` is written whatever the config names.
"""

from balora_jax.registry import Registry
from balora_jax.training.trackers.tensorboard import TENSORBOARD
from balora_jax.training.trackers.tracker import Tracker
from balora_jax.training.trackers.trackio import TRACKIO
from balora_jax.training.trackers.wandb import WANDB

TRACKERS: Registry[Tracker] = Registry("tracker", "training.trackers")
for _tracker in (TENSORBOARD, WANDB, TRACKIO):
    TRACKERS.register(_tracker)
