"""Pictures for people, by matplotlib where the extra ``viz`` is installed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError
from balora_jax.io.folders import check_file, replaced_file
from balora_jax.numerics.terms import TERMS

ACROSS = 3
"""Panels of the curves beside each other."""

_PNG = b"\x89PNG\r\n\x1a\n"


def panels() -> list[tuple[str, tuple[str, ...]]]:
    """Title and columns of each picture of the curves."""
    weights = tuple(f"lambda{i}" for i, _ in enumerate(TERMS, start=1))
    return [
        ("task loss (nats per token)", ("task_loss", "loss")),
        *((term.title, (term.name,)) for term in TERMS.values()),
        ("weights λ", weights),
        ("gradient norm", ("grad_norm",)),
    ]


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


def save_picture(path: Path, paint: Callable[[Any], Any]) -> bool:
    """Paint a figure and save it as a PNG.

    Args:
        path: of the file.
        paint: gets matplotlib's ``pyplot`` and returns the figure.

    Returns:
        Whether it was drawn: matplotlib is an extra (``viz``).
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = paint(pyplot)
    with replaced_file(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    pyplot.close(figure)
    return True


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Loss, terms, weights and gradient norm over the steps as a PNG; whether it was drawn."""

    def paint(pyplot: Any) -> Any:
        steps = [row["step"] for row in rows]
        shown = panels()
        down = -(-len(shown) // ACROSS)
        size = (4 * ACROSS, 3 * down)
        figure, axes = pyplot.subplots(down, ACROSS, figsize=size, constrained_layout=True)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis, (title, names) in zip(axes.flat, shown, strict=False):
            for name in names:
                axis.plot(steps, [row[name] for row in rows], label=name, linewidth=1.2)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimizer step")
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend(fontsize=8)
        return figure

    return save_picture(path, paint)
