"""``python -m tests.bad_inputs.run``: run the bad inputs and count what became of them."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests import compiler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 where every outcome is one that was expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="start of a name; repeatable")
    parser.add_argument("--sixth", action="store_true", help="those of the default tests")
    parser.add_argument("--json", help="write every result to this file")
    options = parser.parse_args(arguments)
    os.environ.update(compiler.on_cpu())  # before JAX is imported
    from tests.bad_inputs.case import Sources
    from tests.bad_inputs.cases import by_name, in_the_sixth
    from tests.bad_inputs.judge import Result, good, judge

    chosen = [
        case
        for name, case in by_name().items()
        if (not options.only or name.startswith(tuple(options.only)))
        and (not options.sixth or in_the_sixth(name))
    ]
    results: list[Result] = []
    slow: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder))
        print("good inputs:", good(sources), flush=True)
        for case in chosen:
            began = time.monotonic()
            result = judge(case, sources)
            results.append(result)
            slow.append((time.monotonic() - began, case.name))
            if result.wrong:
                print(f"{result.name}: {result.outcome}, expected {result.expect}: {result.said}")
                sys.stdout.flush()
    print(f"{len(results)} inputs:", dict(Counter(one.outcome for one in results)))
    print("slowest:", ", ".join(f"{name} {took:.1f} s" for took, name in sorted(slow)[:-9:-1]))
    if options.json:
        Path(options.json).write_text(json.dumps([one._asdict() for one in results], indent=1))
    return 1 if any(one.wrong for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
