"""Pictures for people, by matplotlib where the extra ``viz`` is installed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError
from balora_jax.io import curves
from balora_jax.io.folders import check_file, replaced_file
from balora_jax.io.metrics import read_metrics

EVERY = 30.0
"""Seconds between two pictures of a run that goes on, at least."""

SHARE = 0.015
"""Largest share of the time of a run that its pictures take."""

FIRST_COST = 0.4
"""Seconds that the first picture is taken to need, as none was measured."""

_PNG = b"\x89PNG\r\n\x1a\n"


def check_picture(path: Path | None) -> None:
    """See that a picture can be written, before the work; None is for no picture.

    Raises:
        InputError: no ``.png``, or no file that can be written.
    """
    if path is None:
        return
    if path.suffix != ".png":
        raise InputError(
            f"--picture {path}: expected a name that ends in .png, got another. Choose another."
        )
    check_file(path, f"--picture {path}", begins=(_PNG,))


def save_picture(path: Path, paint: Callable[[Callable[..., Any]], Any]) -> bool:
    """Paint a figure and save it as a PNG.

    Args:
        path: of the file.
        paint: gets what makes a figure and its axes, as pyplot's ``subplots`` does, but without
            pyplot: a caller's plots and backend stay what they are. It returns the figure.

    Returns:
        Whether it was drawn: matplotlib is an extra (``viz``).
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False

    def subplots(rows: int = 1, columns: int = 1, *, figsize: Any, **options: Any) -> Any:
        figure = Figure(figsize=figsize, layout="constrained")
        return figure, figure.subplots(rows, columns, **options)

    figure = paint(subplots)
    with replaced_file(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    return True


def draw_curves(rows: curves.Rows, path: Path) -> bool:
    """The curves of a run as a PNG; whether it was drawn."""
    return bool(rows) and save_picture(path, lambda subplots: curves.paint(rows, subplots))


class LiveCurves:
    """The curves of a run that goes on, drawn anew now and then.

    Args:
        rows: ``metrics.jsonl``.
        picture: the PNG.
    """

    def __init__(self, rows: Path, picture: Path):
        self.rows, self.picture = rows, picture
        self.began = self.drawn = time.monotonic()
        self.spent, self.cost = 0.0, FIRST_COST
        self.can = True

    def follow(self) -> None:
        """Draw, unless it is too early (:data:`EVERY`) or took too much by now (:data:`SHARE`)."""
        now = time.monotonic()
        dear = self.spent + self.cost > SHARE * (now - self.began)
        if not self.can or now - self.drawn < EVERY or dear:
            return
        self.can = draw_curves(read_metrics(self.rows), self.picture)
        self.drawn = time.monotonic()
        self.cost = self.drawn - now
        self.spent += self.cost
