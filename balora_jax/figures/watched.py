"""A process whose memory is watched from outside while it works."""

import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Samples = list[tuple[float, int]]


def watched(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Samples]:
    """Run a command that prints JSON in its last line.

    Returns:
        What it printed, and its anonymous memory in bytes by the monotonic clock, about a thousand
        samples a second.

    Raises:
        SystemExit: its exit code, if that is not 0.
    """
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        samples: Samples = []
        watch = threading.Thread(target=_sample_anonymous, args=(process, samples))
        watch.start()
        text, _ = process.communicate()
        watch.join()
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    return json.loads(text.splitlines()[-1]), samples


def _sample_anonymous(process: subprocess.Popen, samples: Samples) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        # The thread that waits for the process may let it go between two lines of this one.
        with suppress(FileNotFoundError, ProcessLookupError):
            for line in status.read_text(encoding="ascii").splitlines():
                if line.startswith("RssAnon"):
                    samples.append((time.monotonic(), int(line.split()[1]) * 1024))
        time.sleep(0.001)
