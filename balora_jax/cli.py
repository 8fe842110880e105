"""The command line: parse, call one function, turn errors into one sentence and an exit code."""

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from balora_jax import __version__, hardware, signals, torch_import
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.options import Parser
from balora_jax.parallel import child
from balora_jax.untyped.native import silence_stdout
from balora_jax.verbs import (
    bench,
    chat,
    check,
    completion,
    eval,
    export,
    generate,
    plan,
    study,
    train,
)
from balora_jax.verbs.verb import check_paths, check_report, check_text

VERBS = (
    check.VERB,
    train.VERB,
    eval.VERB,
    export.VERB,
    generate.VERB,
    chat.VERB,
    bench.VERB,
    plan.VERB,
    study.VERB,
)

FIRST = "balora train configs/quickstart.yaml --workdir runs/quickstart"


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
    """The program: :func:`main`, after whose end a signal changes nothing any more.

    What a terminal, a file or a pipe cannot show, as its encoding lacks it, is written as an
    escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    hardware.settle_for_cpu(Path("/dev"))
    torch_import.leave_out()
    with signals.taken(for_good=True):
        signals.leave(main(arguments))


def _ended(arguments: list[str], caught: signals.Signals) -> int:
    """Run the command to its end, whatever that is; returns the exit code."""
    try:
        with caught.interruption():
            if not arguments:
                print(overview(), file=sys.stderr)
                return InputError.exit_code
            check_text(arguments)
            options = make_parser().parse_args(arguments)
            options.arguments = arguments
            code = _run(options)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk or a closed pipe: said here, not at the very end
            caught.end()
            return code
    except OSError as error:
        caught.end()
        sentence, code = _refused_by_system(error)
    except (InputError, RunStoppedError) as error:
        caught.end()  # from here on a signal changes nothing any more
        sentence, code = str(error), error.exit_code
    except KeyboardInterrupt:
        caught.end()
        sentence, code = caught.sentence(), RunStoppedError.exit_code
    except (RuntimeError, AssertionError) as error:
        if not _is_of_backends(error):
            raise
        caught.end()
        sentence, code = _not_started(error), InputError.exit_code
    caught.say(sentence)
    return code


def _refused_by_system(error: OSError) -> tuple[str, int]:
    """The sentence and the exit code for what the system does not give."""
    if error.filename is None and sys.stdout is not None:
        silence_stdout()
    where = "output" if error.filename is None else os.fsdecode(error.filename)
    stopped = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
    return (
        f"{where}: expected to read and write there, got: {error.strerror or error}. Correct that "
        "and start again.",
        (RunStoppedError if stopped else InputError).exit_code,
    )


def _is_of_backends(error: Exception) -> bool:
    """Whether JAX found no devices: of a platform without a plugin it says nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    silent = bool(frames) and frames[-1].name == "backends" and "jax" in frames[-1].filename
    return silent or "nable to initialize backend" in str(error)


def _not_started(error: Exception) -> str:
    """The sentence for a JAX that does not start, or not on the devices that are asked for."""
    said = " ".join(str(error).split()).rstrip(".") or "no such device"
    read = {name: text for name, text in sorted(os.environ.items()) if name.startswith("JAX_")}
    listed = ", ".join(f"{name}={text!r}" for name, text in read.items())
    return (
        f"JAX: expected it to start here, got: {said}. Correct the environment variables that it "
        f"reads ({listed or 'no JAX_… is set'}), or install the JAX of this device."
    )


def _import_jax() -> None:
    """Raises InputError for an environment variable that JAX cannot read."""
    try:
        import jax  # noqa: F401
    except (ValueError, TypeError) as error:
        raise InputError(_not_started(error)) from error


def _run(options: argparse.Namespace) -> int:
    if options.config is None:  # the one command that is about no run
        return options.run(None, options) or 0
    _import_jax()
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
    completion.add_to(commands, parser)
    return parser


def overview() -> str:
    """What can be done, for who types the bare name."""
    lines = (f"  balora {verb.name:<9} {verb.summary}" for verb in VERBS)
    return "\n".join(
        [
            "balora fine-tunes Hugging Face models with LoRA-family adapters (BA-LoRA):",
            *lines,
            f"First: {FIRST}. More: balora COMMAND --help.",
        ]
    )
