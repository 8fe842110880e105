"""The command line: parse, call one function, turn errors into one sentence and an exit code."""

import argparse
import errno
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError, RunStoppedError
from balora_jax.parallel import supervise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 (done), 2 (bad input) or 3 (the run had to stop)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = make_parser().parse_args(arguments)
    options.arguments = arguments
    try:
        _check_report(getattr(options, "json", None))
        return options.run(options) or 0
    except (InputError, RunStoppedError) as error:
        print(f"balora: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("balora: interrupted before a checkpoint could be written.", file=sys.stderr)
        code = RunStoppedError.exit_code
    if supervise.is_child():
        from balora_jax.parallel import hosts

        hosts.leave(code)
    return code


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="balora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", run_train, "fine-tune as a config says")
    train.add_argument("--workdir", required=True, help="folder that gets everything of the run")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    _add_hosts(train)

    evaluate = _command(commands, "eval", run_eval, "score a base model or an adapter")
    evaluate.add_argument("--adapter", help="PEFT folder; the base alone without it")
    evaluate.add_argument("--json", help="write the figures to this file")

    export = _command(commands, "export", run_export, "write a trained adapter for other tools")
    export.add_argument("--workdir", required=True, help="folder of the run")
    export.add_argument("--format", choices=("peft", "merged"), default="peft")
    export.add_argument("--out", required=True, help="new folder")
    export.add_argument("--rank", type=int, help="recompress to this rank (peft only)")
    export.add_argument("--json", help="write the figures to this file")

    generate = _command(commands, "generate", run_generate, "continue prompts")
    generate.add_argument("--adapter", help="PEFT folder; the base alone without it")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--raw", action="store_true", help="do not apply data.template")
    generate.add_argument("--json", help="write prompts and texts to this file")

    bench = _command(commands, "bench", run_bench, "time and memory of a training step")
    bench.add_argument("--rounds", type=int, default=5, help="counted steps of each case")
    bench.add_argument("--case", action="append", default=[], help="only this one; repeatable")
    bench.add_argument("--against", choices=("torch",), help="run the torch reference beside ours")
    bench.add_argument("--topology", help="compile for a TPU slice instead, such as v5e:4x4")
    bench.add_argument("--picture", help="draw time and memory to this PNG")
    bench.add_argument("--json", help="write the figures to this file")

    _add_plan(commands)
    study = _command(commands, "study", run_study, "compare variants over data sets and seeds")
    study.add_argument("--workdir", required=True, help="folder that gets every run and the table")
    study.add_argument(
        "--only", action="append", default=[], metavar="DATASET/VARIANT", help="repeatable"
    )
    study.add_argument("--picture", help="draw the bars to this PNG, not to study.png")
    study.add_argument("--json", help="write the figures to this file")
    return parser


def _add_hosts(train: argparse.ArgumentParser) -> None:
    """How the processes of a run on several hosts find each other."""
    several = train.add_argument_group(
        "several processes",
        "one on each host, on each GPU under SLURM and Open MPI; there, and on the hosts of a TPU "
        "slice, they find each other without the options",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, help="how many there are")
    several.add_argument("--process", type=int, help="number of this one, from 0")
    several.add_argument(
        "--host-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="how long a host may be silent before the others stop",
    )


def _add_plan(commands: Any) -> None:
    plan = _command(commands, "plan", run_plan, "memory and speed of a run before it starts")
    devices = "v5e:4x4, gpu:8x80GB, gpu:8xH100, cpu:8; auto: the devices here"
    plan.add_argument("--topology", default="auto", help=devices)
    plan.add_argument("--mesh", help="auto to search, or sizes such as data=1,fsdp=16")
    plan.add_argument("--head", choices=("fused", "plain"), help="instead of training.head")
    plan.add_argument("--candidates", type=int, default=8, help="most compilations of a search")
    plan.add_argument("--utilisation", type=float, default=0.4, help="share of the peak reached")
    plan.add_argument("--picture", help="draw the bytes of every plan to this PNG")
    plan.add_argument("--json", help="write the figures to this file")


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text)
    parser.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override settings of the config; may be repeated",
    )
    parser.set_defaults(run=run)
    return parser


def run_train(options: argparse.Namespace) -> int:
    """``balora train``; with several processes, as the child of a process that watches it."""
    from balora_jax import fit, load_config
    from balora_jax.parallel import hosts
    from balora_jax.parallel import launch as clusters

    config = load_config(options.config, options.set)
    start = clusters.start_of(
        *(options.coordinator, options.processes, options.process, options.host_timeout),
        os.environ,
    )
    if start is not None:
        if not supervise.is_child():
            return supervise.run_child(supervise.module_command(options.arguments))
        supervise.end_with_parent()
        hosts.connect(start)
    fit(config, workdir=options.workdir, resume=options.resume)
    return 0


def run_eval(options: argparse.Namespace) -> None:
    """``balora eval``."""
    from balora_jax import load_config
    from balora_jax.tasks.labels import score as label_score
    from balora_jax.tasks.text.score import evaluate

    config = load_config(options.config, options.set)
    score = label_score.evaluate if config.task == "nlu" else evaluate
    figures = score(config, adapter=options.adapter)
    _report(figures, options.json)


def run_generate(options: argparse.Namespace) -> None:
    """``balora generate``."""
    from balora_jax import load_config
    from balora_jax.tasks.text.score import continue_prompts

    config = load_config(options.config, options.set)
    if config.task == "nlu":
        raise InputError("generate: expected task nlg, got nlu. Use balora eval for labels.")
    texts = continue_prompts(config, options.prompt, adapter=options.adapter, raw=options.raw)
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"> {prompt}\n{text}")
    if options.json:
        _report([{"prompt": p, "text": t} for p, t in zip(options.prompt, texts, strict=True)],
                options.json)  # fmt: skip


def run_export(options: argparse.Namespace) -> None:
    """``balora export``."""
    from balora_jax import load_config
    from balora_jax.pretrained.export import export_run

    config = load_config(options.config, options.set)
    figures = export_run(
        config, Path(options.workdir), Path(options.out), format=options.format, rank=options.rank
    )
    _report(figures, options.json)


def run_bench(options: argparse.Namespace) -> None:
    """``balora bench``."""
    from balora_jax import load_config
    from balora_jax.bench.run import bench
    from balora_jax.errors import InputError

    if options.rounds < 1:
        raise InputError(f"--rounds: expected at least 1, got {options.rounds}. Raise it.")
    figures = bench(
        load_config(options.config, options.set),
        rounds=options.rounds,
        cases=options.case,
        against_torch=options.against == "torch",
        topology=options.topology,
        picture=None if options.picture is None else Path(options.picture),
    )
    if options.json:
        _report(figures, options.json)


def run_plan(options: argparse.Namespace) -> None:
    """``balora plan``."""
    from balora_jax import load_config
    from balora_jax.plan.plan import plan

    figures = plan(
        load_config(options.config, options.set),
        topology=options.topology,
        mesh=options.mesh,
        head=options.head,
        candidates=options.candidates,
        utilisation=options.utilisation,
        picture=None if options.picture is None else Path(options.picture),
    )
    if options.json:
        _report(figures, options.json)


def run_study(options: argparse.Namespace) -> None:
    """``balora study``."""
    from balora_jax import load_config
    from balora_jax.study.run import conduct, raise_failures

    figures = conduct(
        load_config(options.config, options.set),
        workdir=options.workdir,
        only=options.only,
        picture=None if options.picture is None else Path(options.picture),
    )
    if options.json:
        _report(figures, options.json)
    raise_failures(figures)


def _check_report(file: str | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if file is None:
        return
    try:
        if Path(file).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=Path(file).parent):
            pass
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: str, error: OSError) -> InputError:
    return InputError(
        f"--json {file}: expected a file that can be written, got {error.strerror}. Choose another."
    )


def _report(figures: Any, file: str | None) -> None:
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    if file is None:
        print(text)
        return
    from balora_jax.io.folders import write_atomically

    try:
        write_atomically(Path(file), text + "\n")
    except OSError as error:
        raise _unwritable(file, error) from error
    print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
