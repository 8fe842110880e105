"""Pictures for people, by matplotlib where the extra ``viz`` is installed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("task loss (nats per token)", ("task_loss", "loss")),
    ("consistency: T² KL to the teacher", ("consistency",)),
    ("diversity: minus entropy (nats)", ("diversity",)),
    ("spectral: minus ratio of singular values", ("spectral",)),
    ("weights λ", ("lambda1", "lambda2", "lambda3")),
    ("gradient norm", ("grad_norm",)),
)
"""Title and columns of each picture of the curves."""


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
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Loss, terms, weights and gradient norm over the steps as a PNG; whether it was drawn."""

    def paint(pyplot: Any) -> Any:
        steps = [row["step"] for row in rows]
        figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
        for axis, (title, names) in zip(axes.flat, PANELS, strict=True):
            for name in names:
                axis.plot(steps, [row[name] for row in rows], label=name, linewidth=1.2)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimizer step")
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend(fontsize=8)
        return figure

    return save_picture(path, paint)
