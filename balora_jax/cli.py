"""The command line: parse, call one function, turn errors into one sentence and an exit code."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from balora_jax import __version__, signals
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.options import Parser
from balora_jax.parallel import child
from balora_jax.verbs import bench, check, eval, export, generate, plan, study, train
from balora_jax.verbs.verb import check_paths, check_report

VERBS = (
    check.VERB,
    train.VERB,
    eval.VERB,
    export.VERB,
    generate.VERB,
    bench.VERB,
    plan.VERB,
    study.VERB,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 (done), 2 (bad input) or 3 (the run had to stop)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with signals.taken() as caught, signals.watched(caught):
        code = _ended(arguments, caught)
    if child.is_child():
        from balora_jax.parallel import hosts

        hosts.leave(code)
    return code


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """The program: :func:`main`, after whose end a signal changes nothing any more."""
    with signals.taken(for_good=True):
        sys.exit(main(arguments))


def _ended(arguments: list[str], caught: signals.Signals) -> int:
    """Run the command to its end, whatever that is; returns the exit code."""
    try:
        with caught.interruption():
            options = make_parser().parse_args(arguments)
            options.arguments = arguments
            code = _run(options)
            caught.end()
            return code
    except (InputError, RunStoppedError) as error:
        caught.end()  # from here on a signal changes nothing any more
        sentence, code = str(error), error.exit_code
    except KeyboardInterrupt:
        caught.end()
        sentence, code = caught.sentence(), RunStoppedError.exit_code
    caught.say(sentence)
    return code


def _run(options: argparse.Namespace) -> int:
    from balora_jax.config_file import load_config

    check_paths(options)
    check_report(getattr(options, "json", None))
    return options.run(load_config(options.config, options.set), options) or 0


def make_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(
        prog="balora",
        description="Fine-tune Hugging Face models on TPU and GPU with LoRA-family adapters and "
        "with regularizers that keep what the model knew (BA-LoRA).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for verb in VERBS:
        verb.add_parser(commands)
    return parser
