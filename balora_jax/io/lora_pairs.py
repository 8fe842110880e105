"""Trained adapters as low-rank pairs, one for each module, whatever file they go to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from balora_jax.errors import InputError
from balora_jax.models.adapters import AdaptedModule


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        folder: the adapter folder.
        modules: adapted linear layers in it.
        parameters: numbers in its tensors.
        rank: largest rank in it (twice the trained rank where the start is not zero and A trains).
        errors: relative Frobenius error of each recompressed module's delta, by checkpoint name;
            empty where nothing was recompressed.
        error: the same over all modules together.
    """

    folder: Path
    modules: int
    parameters: int
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


@dataclass(frozen=True)
class Pair:
    """One module ready to be written: its delta is ``scale · down @ up``.

    Attributes:
        module: the adapted layer.
        down: [in, r] float32.
        up: [r, out] float32.
        scale: the factor on their product.
        magnitude: DoRA's, [out] float32; None for other methods.
        lost: Frobenius norm of what a recompression left out of the delta.
        whole: that of the delta before it; 0 where nothing was recompressed.
    """

    module: AdaptedModule
    down: np.ndarray
    up: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    lost: float = 0.0
    whole: float = 0.0

    @property
    def rank(self) -> int:
        """Columns of ``down``."""
        return self.down.shape[1]

    def alpha(self, use_rslora: bool) -> float:
        """Numerator from which PEFT computes this module's scale."""
        divisor = math.sqrt(self.rank) if use_rslora else self.rank
        exact = self.module.alpha / divisor  # keep the user's alpha where it is already right
        same = math.isclose(exact, self.scale, rel_tol=1e-9)
        return float(self.module.alpha if same else self.scale * divisor)


def delta_pair(
    module: AdaptedModule, adapters: Mapping[str, Any], origin: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank factors (down [in, r], up [r, out]) with ``delta = scale · down @ up``, float32.

    Without an origin these are A and B cut to the module's true rank. With an origin the rank
    doubles: ``A B − A₀ B₀ = [A − A₀, A₀] [B; B − B₀]``. Where A is frozen (in ``origin`` itself)
    it stays: ``A (B − B₀)``.

    Source: PiSSA (arXiv 2404.02948) converts with ``[A, A₀] [B; −B₀]``; the same sum, but there two
    large products cancel, here every product is as small as the update.
    """
    down = _layer(module, adapters, origin, "lora_a")[:, : module.rank]
    up = _layer(module, adapters, origin, "lora_b")[: module.rank]
    if f"{module.path}.origin_b" not in origin:
        return down, up
    moved = up - _layer(module, adapters, origin, "origin_b")[: module.rank]
    if f"{module.path}.origin_a" not in origin:
        return down, moved
    down0 = _layer(module, adapters, origin, "origin_a")[:, : module.rank]
    return np.concatenate([down - down0, down0], 1), np.concatenate([up, moved], 0)


def magnitude_of(module: AdaptedModule, adapters: Mapping[str, Any]) -> np.ndarray | None:
    """DoRA's length of every output's weights, [out] float32; None for other methods."""
    if "lora_magnitude" not in module.method.parts(origin=False):
        return None
    return _layer(module, adapters, {}, "lora_magnitude")


def _layer(
    module: AdaptedModule, adapters: Mapping[str, Any], origin: Mapping[str, Any], key: str
) -> np.ndarray:
    """A module's own part of a stack, wherever the stack lies, float32."""
    path = f"{module.path}.{key}"
    stack = adapters[path] if path in adapters else origin[path]
    return np.asarray(stack[module.layer], np.float32)


def recompress(
    down: np.ndarray, up: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Best factors of a smaller rank for ``down @ up``, without forming that product.

    Args:
        down: [in, r].
        up: [r, out].
        rank: rank wanted, at most r.

    Returns:
        down [in, rank] and up [rank, out] in float32, and the Frobenius norms of what is lost and
        of the whole. Source: Eckart-Young, through the QR factors of both sides in float64.

    >>> down, up, lost, whole = recompress(np.eye(3, 2), np.array([[4.0, 0], [0, 3]]), 1)
    >>> np.abs(down @ up).round(6).tolist(), round(lost, 6), round(whole, 6)
    ([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]], 3.0, 5.0)
    """
    q_down, r_down = np.linalg.qr(down.astype(np.float64))
    q_up, r_up = np.linalg.qr(up.astype(np.float64).T)
    u, sigma, vt = np.linalg.svd(r_down @ r_up.T, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    small_down = (q_down @ (u[:, :rank] * root)).astype(np.float32)
    small_up = ((root[:, None] * vt[:rank]) @ q_up.T).astype(np.float32)
    return small_down, small_up, _norm(sigma[rank:]), _norm(sigma)


def check_rank(rank: int | None) -> None:
    """Raises InputError for a rank that nothing can be recompressed to."""
    if rank is not None and rank < 1:
        raise InputError(f"rank: expected at least 1, got {rank}. Choose a rank to recompress to.")


def trained_pair(
    module: AdaptedModule,
    adapters: Mapping[str, Any],
    origin: Mapping[str, Any],
    rank: int | None,
) -> Pair:
    """The pair of a trained module, recompressed where its rank is larger than ``rank``.

    Args:
        module: the adapted layer.
        adapters: stacks by path, as :func:`~balora_jax.io.peft_writer.export_peft` takes them.
        origin: likewise.
        rank: the largest wanted; None for any.
    """
    down, up = delta_pair(module, adapters, origin)
    magnitude = magnitude_of(module, adapters)
    if rank is None:
        return Pair(module, down, up, module.scale, magnitude)
    small_down, small_up, lost, whole = recompress(down, up, rank)
    lost, whole = lost * module.scale, whole * module.scale
    if down.shape[1] <= rank:
        return Pair(module, down, up, module.scale, magnitude, 0.0, whole)
    return Pair(module, small_down, small_up, module.scale, magnitude, lost, whole)


def report_of(
    folder: Path, pairs: Sequence[Pair], numbers: int, recompressed: bool
) -> ExportReport:
    """What is said of an export: its modules, its numbers, and what a recompression lost."""
    whole = _norm(np.array([pair.whole for pair in pairs]))
    lost = _norm(np.array([pair.lost for pair in pairs]))
    errors = {p.module.name: p.lost / p.whole if p.whole else 0.0 for p in pairs}
    return ExportReport(
        folder=folder,
        modules=len(pairs),
        parameters=numbers,
        rank=max(pair.rank for pair in pairs),
        errors=errors if recompressed else {},
        error=lost / whole if whole else 0.0,
    )


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(values))))
