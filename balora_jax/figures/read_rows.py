"""Seconds and memory that reading rows takes, beside `datasets`.

``python -m balora_jax.figures.read_rows [--rows 1000000] [--bytes 1000] [--rounds 3]`` writes a
file of JSON lines to a temporary folder and reads it in fresh processes, in turn with
:func:`balora_jax.data.sources.load_rows` and with ``load_dataset("json", …)`` and an empty cache:
until the rows are there, and then once through all of them. ``--file`` reads a file of yours.

Memory is the growth of anonymous memory (``RssAnon``: the program's own) from before the reading to
its highest point; the mapped pages of a file, which the system may drop, are not in it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from balora_jax.bench.measure import resident
from balora_jax.figures.watched import watched

READERS = ("load_rows", "datasets")
_TEXT = "the rows of a café are read as they stand: 007, 2024-01-05 and no more; "


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each reader, and the ratio of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file")
    parser.add_argument("--bytes", type=int, default=1000, help="of a row, about")
    parser.add_argument("--rounds", type=int, default=3, help="readings by each")
    parser.add_argument("--file", help="JSON lines of yours instead")
    parser.add_argument("--only", choices=READERS, help="read it in this process, by one of them")
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or str(Path(folder) / "rows.jsonl")
        if options.only:
            print(json.dumps(read(options.only, file, folder)))
            return
        if not options.file:
            write_rows(Path(file), options.rows, options.bytes)
        rounds = [{name: measured(name, file) for name in READERS} for _ in range(options.rounds)]
        print(f"{Path(file).stat().st_size / 1e6:.0f} MB")
    found = {name: _medians([one[name] for one in rounds]) for name in READERS}
    found["over datasets"] = _medians([_ratios(one) for one in rounds])
    print(_table(found), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_rows(file: Path, count: int, size: int) -> None:
    """JSON lines of about this many bytes: a number, a question and an answer of words."""
    words = _TEXT * (size // 50 + 1)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            start = number % 50
            row = {
                "id": number,
                "instruction": words[start : start + size // 4],
                "output": words[start : start + size - size // 4 - 60] + "\n",
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(reader: str, file: str, folder: str) -> dict[str, Any]:
    """Read a file in this process.

    Args:
        reader: one of `READERS`.
        file: of JSON lines.
        folder: an empty one, for a cache.

    Returns:
        ``load`` and ``iterate``: seconds; ``begin`` and ``end`` of both on the monotonic clock;
        ``before``: bytes of anonymous memory at the begin; ``rows``; ``characters`` of all text;
        ``cache``: bytes in the folder.
    """
    if reader == "datasets":
        import datasets

        datasets.disable_progress_bars()

        def load() -> Iterable[Any]:
            found = datasets.load_dataset("json", data_files=file, cache_dir=folder, split="train")
            return cast(Any, found)
    else:
        from balora_jax.data.sources import load_rows

        def load() -> Iterable[Any]:
            return load_rows(file)

    before, begin = resident("RssAnon"), time.monotonic()
    rows = load()
    loaded = time.monotonic()
    count = characters = 0
    for row in rows:
        count += 1
        characters += sum(len(cell) for cell in row.values() if isinstance(cell, str))
    end = time.monotonic()
    cache = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "load": loaded - begin,
        "iterate": end - loaded,
        "begin": begin,
        "end": end,
        "before": before,
        "rows": count,
        "characters": characters,
        "cache": cache,
    }


def measured(reader: str, file: str) -> dict[str, float]:
    """Read a file in a process of its own and watch it: seconds, MB of memory and of disk."""
    command = [sys.executable, "-m", "balora_jax.figures.read_rows", "--only", reader]
    found, samples = watched([*command, "--file", file])
    inside = [size for when, size in samples if found["begin"] <= when <= found["end"]]
    memory = max([*inside, found["before"]]) - found["before"]
    return {
        "rows": found["rows"],
        "characters": found["characters"],
        "load s": found["load"],
        "iterate s": found["iterate"],
        "both s": found["load"] + found["iterate"],
        "memory MB": memory / 1e6,
        "disk MB": found["cache"] / 1e6,
    }


def _ratios(one: dict[str, dict[str, float]]) -> dict[str, float]:
    ours, theirs = (one[name] for name in READERS)
    return {name: ours[name] / theirs[name] if theirs[name] else float("nan") for name in ours}


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _table(found: dict[str, dict[str, float]]) -> str:
    titles = list(next(iter(found.values())))
    lines = [" " * 14 + "".join(f"  {title:>12}" for title in titles)]
    for name, row in found.items():
        lines.append(f"{name:>14}" + "".join(f"  {row[title]:12.6g}" for title in titles))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
