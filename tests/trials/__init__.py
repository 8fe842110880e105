"""Many random trials of what must never go wrong; the tests run a few, the commands here all.

    python -m tests.trials.kills --count 100 --signal KILL --json kill.json
    python -m tests.trials.kills --count 100 --signal TERM --json term.json
    python -m tests.trials.overlaps --count 10 --json overlaps.json

Each goes on where it was stopped, with the same file. A trial depends on its number alone (and on
the clock of the machine, which decides what a moment meets), and can be repeated with ``--only``.
"""
