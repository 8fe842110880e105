"""Checks of the folder of a run: it may be written to, and all hosts see the same one."""

import os
import tempfile
from pathlib import Path

from balora_jax.errors import InputError
from balora_jax.parallel import hosts
from balora_jax.pretrained import export

TOKEN = "hosts_see_this"


def check_workdir(folder: Path, resume: bool) -> None:
    """Raises InputError unless the folder can be written and does not hold another run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--workdir {folder}: expected a folder, got a file. Choose another.")
    holds_run = (folder / "config.yaml").exists() or (folder / "checkpoints").exists()
    if holds_run and not resume:
        raise InputError(
            f"--workdir {folder}: expected a new or empty folder, got one that holds a run. "
            "Add --resume to go on with it, or choose another folder."
        )
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"--workdir {folder}: expected a folder that can be written, got "
            f"{os.strerror(error.errno or 0)}. Choose another or change its permissions."
        ) from error


def check_folders(folder: Path, *, resume: bool, full: bool) -> None:
    """As :func:`check_workdir`; nor may a full fine-tuning replace a model of the user's there."""
    check_workdir(folder, resume)
    target = folder / export.MODEL
    if full and target.exists() and not (resume and (folder / "config.yaml").exists()):
        raise InputError(
            f"--workdir {folder}: expected no {export.MODEL}/ in it before a full fine-tuning, "
            "which writes one, got one. Choose another folder."
        )


def make_folder(folder: Path) -> None:
    """Make the folder, and check that every host sees it.

    Raises:
        InputError: a host looks at another disk: its parts of the checkpoints would be lost.
    """
    token = folder / TOKEN
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    hosts.barrier("workdir made")

    def look() -> None:
        if not token.exists():
            raise InputError(
                f"--workdir {folder}: expected a folder that all hosts share, got one that this "
                "host does not see. Name a folder on NFS, Filestore or a mounted bucket."
            )

    hosts.together(look)
    if hosts.is_first():
        token.unlink()
