"""Results of trials in a JSON file, written after each of them, so that the next start goes on."""

import json
import os
import subprocess
from pathlib import Path


class Record:
    """The results by the number of the trial."""

    def __init__(self, file, head):
        self.file, self.head = Path(file), head
        self.trials = {}
        if self.file.exists():
            found = json.loads(self.file.read_text())
            assert {name: found[name] for name in head} == head, f"{file} is of other trials"
            self.trials = found["trials"]

    def has(self, number):
        """Whether a trial is done."""
        return str(number) in self.trials

    def put(self, number, found):
        """Add the result of a trial."""
        self.trials[str(number)] = found | {"commit": _commit()}
        draft = self.file.with_name(self.file.name + ".draft")
        draft.write_text(json.dumps(self.head | {"trials": self.trials}, indent=1) + "\n")
        os.replace(draft, self.file)

    def wrong(self):
        """Numbers of the trials that went wrong."""
        return [int(number) for number, found in self.trials.items() if found["wrong"]]


def _commit():
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip()
