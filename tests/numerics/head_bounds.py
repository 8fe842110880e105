"""Bounds of rounding in the head's values and gradient, whatever the order of its sums.

Bounds in float64 from the arrays of a case, to first order in u = 2^-24. Products of hidden states
and head are exact in float32 (``sharded_head.arrays``), and so is division by T. What is left:

- A sum of n terms, in any order and split over any devices, rounds n - 1 partial sums, none above
  S, the sum of the terms' sizes. Errors of rounding are taken as independent with mean 0: by
  Azuma's inequality the sum errs by more than 6 u √n S once in 3e7 (Higham and Mary, 2019). Such
  errors are held as ``spread``, without the 6 u; those of several rows or sums add as squares.
- exp and log err by 4 u of the result (XLA's by up to 2), tanh by 8 (6), one rounding by 1. These
  may have one sign everywhere: they are held as ``full``, in units of u, and add as they are.
- What cancels keeps the errors of its parts: a divergence those of two logarithms, the loss those
  of all its terms.
- Products that err by a matrix E move a singular value by uᵀEv, and Σ g_i u_i v_iᵀ by the entries
  of E in that basis times (g_i - g_j) / (σ_i - σ_j) and (g_i + g_j) / (σ_i + σ_j).
"""

import functools
from typing import NamedTuple

import numpy as np

from balora_jax.numerics import krylov

U = 2.0**-24
FUNCTION = 4  # exp, log
TANH = 8
SIGMAS = 6


class Softmax:
    """Of logits [N, V] with errors ``dz`` at a temperature, and its errors; those of p relative."""

    def __init__(self, z, dz, temperature=1.0):
        self.z, self.largest = z / temperature, z.max(1, keepdims=True) / temperature
        self.dz = (dz + dz.max(1, keepdims=True)) / temperature
        below = self.largest - self.z
        self.log_total = np.log(np.exp(-below).sum(1))
        self.log_p = -below - self.log_total[:, None]
        self.p = np.exp(self.log_p)
        self.full = (self.p * (FUNCTION + self.dz + below)).sum(1) + FUNCTION * self.log_total
        self.spread = np.sqrt(z.shape[1])
        self.log_p_full = self.dz + below + self.full[:, None] - self.log_p
        self.p_full = FUNCTION + self.log_p_full


class RowErrors(NamedTuple):
    """Values of rows [N] and their errors."""

    values: np.ndarray
    full: np.ndarray
    spread: np.ndarray

    def of_sum(self, mask):
        values, full, spread = (array[mask] for array in self)
        partial_sums = len(values) * abs(values).sum() ** 2
        return U * (full.sum() + SIGMAS * np.sqrt((spread**2).sum() + partial_sums))


def cross_entropy(s, labels):
    chosen = np.arange(len(labels)), labels
    values = -s.log_p[chosen]
    full = s.full + s.dz[chosen] + 2 * values
    return RowErrors(values, full, np.full_like(values, s.spread))


def divergence(s, t):
    """Σ p_t ((z_t - z_s) - (largest_t - largest_s)) + log_total_s - log_total_t."""
    apart, ahead = t.z - s.z, t.largest - s.largest
    moved = apart - ahead
    moved_full = s.dz + t.dz + abs(apart) + abs(ahead) + abs(moved)
    mean, size = (t.p * moved).sum(1), (t.p * abs(moved)).sum(1)
    values = mean + s.log_total - t.log_total
    full = (t.p * (abs(moved) * (t.p_full + 1) + moved_full)).sum(1) + s.full + t.full
    full += abs(mean) + abs(mean + s.log_total) + values
    # The sum over the vocabulary, the student's logarithm, the teacher's (it is in p too).
    return RowErrors(values, full, s.spread * np.sqrt(size**2 + 1 + (1 + abs(mean)) ** 2))


def entropy(s):
    values = -(s.p * s.log_p).sum(1)
    full = (s.p * (s.log_p_full - s.log_p * (s.p_full + 1))).sum(1)
    return RowErrors(values, full, s.spread * np.sqrt(values**2 + (1 + values) ** 2))


class Spectral(NamedTuple):
    """Bounds of the ratio and of its gradient with respect to Z, and what the rest of the gradient needs.

    Attributes:
        size: The ratio.
        value: Its bound.
        gradient: Bound of ``low`` in the Frobenius norm.
        low: The gradient without its share of Z, ``[N, V]``.
        shrink: Z's coefficient in the gradient.
        shrink_full: Its relative error, in units of u.
        residual: Most that a pass may report as its residual.
    """

    size: float
    value: float
    gradient: float
    low: np.ndarray
    shrink: float
    shrink_full: float
    residual: float


def spectral(z, dz, factors, spec):
    """Of Z = A Bᵀ, ``factors = (A, B)``, or of ``factors = (Z,)`` where products take Z itself."""
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    rank, k, nuclear = min(factors[0].shape), spec.k, spec.norm == "nuclear"
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    top, size = s[:k].sum(), s.sum() if nuclear else np.sqrt((s**2).sum())
    # An entry of a product of length n errs by √n |row| |column|. Two products with unit vectors,
    # each by two factors, make a triplet; as much again for the orthogonal steps between them.
    left, gain = factors[0], np.prod([np.linalg.norm(b, 2) for b in factors[1:]])
    longest = max(np.linalg.norm(left, axis=axis).max() for axis in (0, 1))
    entry = 4 * SIGMAS * U * sum(np.sqrt(left.shape)) * longest * gain
    entry += U * np.linalg.norm(dz)
    g, gap = np.where(np.arange(rank) < k, 1 / size, 0.0), s[k - 1] - s[k]
    if nuclear:  # exact decomposition
        residual, g = 0.0, g - top / size**2
        size_error = np.sqrt(rank) * entry
    else:
        # The iteration ends with ||Zᵀ U - V S|| below a share of the gap or the rounding of σ_1:
        # U, V and S are exact for a matrix that is as far away.
        residual = max(krylov.TOLERANCE * gap, 8 * U * s[0]) + np.sqrt(k) * entry
        size_error = entry + size * SIGMAS * U * np.sqrt(left.size) / 2
    top_error = np.sqrt(k) * entry + k * residual**2 / gap
    relative = top_error / top + 3 * size_error / size
    apart, ahead = abs(g[:, None] - g), abs(g[:, None] + g) / (s[:, None] + s)
    apart = np.divide(apart, abs(s[:, None] - s), out=np.zeros_like(apart), where=apart > 0)
    entries = (apart**2 + ahead**2).sum() + (sum(z.shape) - 2 * rank) * ((g / s) ** 2).sum()
    return Spectral(
        size=top / size,
        value=top_error / size + top * size_error / size**2 + 3 * U * top / size,
        gradient=entry * np.sqrt(entries) + residual * apart.max() + relative * np.linalg.norm(g),
        low=-(u * g) @ vt,
        shrink=0.0 if nuclear else top / size**3,
        shrink_full=relative / U + 4,
        residual=residual / np.sqrt((s[:k] ** 2).sum()),
    )


def mapped(products, logit_map):
    """Logits and their errors in units of u: the products are exact, the map's steps are not."""
    z, cap = products, logit_map.soft_cap
    if cap is None:
        return z, np.zeros_like(z)
    z = cap * np.tanh(z / cap)
    return z, abs(z) * (TANH + 2)


class Case:
    """One computation of the head from these arrays: bounds of its values and of its gradient.

    Where the weight of the consistency is adaptive it is ``adaptive`` times the mean entropy.
    """

    def __init__(self, rows, embedding, scales, adaptive, spec, logit_map):
        self.used = np.flatnonzero(rows.label_mask | rows.term_mask)
        student, teacher, *rest = (np.asarray(array)[self.used] for array in rows[:5])
        student, teacher, self.w = (np.float64(a) for a in (student, teacher, embedding))
        self.labels, self.label_mask, self.mask = rest
        self.spec, self.map, self.scales, self.scale_error = spec, logit_map, scales, 0.0
        self.z, dz = mapped(student @ self.w.T, logit_map)
        self.one, self.s = Softmax(self.z, dz), Softmax(self.z, dz, spec.temperature)
        self.t = Softmax(*mapped(teacher @ self.w.T, logit_map), spec.temperature)
        self.best = np.argsort(-self.z, axis=1, kind="stable")[:, : spec.top_k or len(self.w)]
        self.few = Softmax(*(np.take_along_axis(a, self.best, 1) for a in (self.z, dz)))
        self._check_best(dz)
        self.kept, head = self.z, self.w
        if spec.center_rows:
            self.kept, head = _centred(self.z, 1), _centred(head, 0)
        kept = self.kept[self.mask]
        factors = (kept,) if logit_map.soft_cap else (student[self.mask], head)
        self.ratio = spectral(kept, dz[self.mask], factors, spec)
        self.rows = {
            "task_sum": (cross_entropy(self.one, self.labels), self.label_mask),
            "consistency_sum": (divergence(self.s, self.t), self.mask),
            "diversity_sum": (entropy(self.few), self.mask),
        }
        if spec.teacher_entropy:
            self.rows["teacher_entropy_sum"] = entropies, _ = entropy(self.t), self.mask
            mean = entropies.values[self.mask].mean()
            share = entropies.of_sum(self.mask) / (mean * self.mask.sum())
            self.scales, self.scale_error = (
                scales._replace(consistency=adaptive * mean),
                share + 3 * U,
            )

    @functools.cached_property
    def values(self):
        """The bound of each value by name; counts are exact."""
        squared = self.spec.temperature**2
        sizes = {name: rows.values[mask].sum() for name, (rows, mask) in self.rows.items()}
        found = {name: rows.of_sum(mask) for name, (rows, mask) in self.rows.items()}
        sizes["spectral"], found["spectral"] = self.ratio.size, self.ratio.value
        sizes["consistency_sum"] *= squared
        found["consistency_sum"] *= squared
        # Four products and four sums, none above the sum of all sizes.
        loss = self.scale_error * self.scales.consistency * sizes["consistency_sum"]
        for scale, name in zip(
            self.scales, ("task_sum", "consistency_sum", "diversity_sum", "spectral"), strict=True
        ):
            loss += scale * (found[name] + 8 * U * sizes[name])
        return {"task_count": 0, "term_count": 0, "teacher_entropy_sum": 0, **found, "loss": loss}

    @functools.cached_property
    def gradient(self):
        """The bound of ``d loss / d hidden``, [N, D], in the Frobenius norm."""
        size, full = np.zeros_like(self.z), np.zeros_like(self.z)
        for part, error in (self._task(), self._consistency(), self._diversity(), self._spectral()):
            # One product by its scale, and three sums with the other parts.
            size, full = size + abs(part), full + error + 4 * abs(part)
        slope = np.ones_like(self.z)
        if self.map.soft_cap:
            share = (self.z / self.map.soft_cap) ** 2
            slope *= 1 - share
            full = full * slope + size * 2 * share * (TANH + 4)
        size, full = size * slope, full + 3 * size * slope
        full = (full + SIGMAS * np.sqrt(len(self.w)) * size) @ abs(self.w)
        low = self.ratio.gradient * self.scales.spectral * np.linalg.norm(self.w, 2)
        return U * np.linalg.norm(full) + low

    # Each term's ``d loss / d logits`` and its error in units of u, [N, V].

    def _task(self):
        scale, apart = self.scales.task * self.label_mask[:, None], self.one.p.copy()
        apart[np.arange(len(apart)), self.labels] -= 1
        return scale * apart, scale * (_p_error(self.one) + abs(apart))

    def _consistency(self):
        scale = self.scales.consistency * self.spec.temperature * self.mask[:, None]
        apart, errors = self.s.p - self.t.p, _p_error(self.s) + _p_error(self.t)
        return scale * apart, scale * (errors + abs(apart) * (1 + self.scale_error / U))

    def _diversity(self):
        """``p (log p + entropy)``, zero in columns that were not chosen."""
        few, (values, full, spread) = self.few, entropy(self.few)
        inner = few.log_p + values[:, None]
        error = few.log_p_full + abs(inner) + (full + SIGMAS * (spread + few.spread))[:, None]
        error = few.p * (error + abs(inner)) + abs(inner) * _p_error(few)
        found = np.zeros((2, *self.z.shape))
        for array, part in zip(found, (few.p * inner, error), strict=True):
            np.put_along_axis(array, self.best, part, 1)
        return self.scales.diversity * self.mask[:, None] * found

    def _spectral(self):
        kept, low = self.ratio.shrink * self.kept * self.mask[:, None], np.zeros_like(self.z)
        if self.map.soft_cap:  # else its product with the head is formed at once
            low[self.mask] = self.ratio.low
        means = abs(self.ratio.shrink * self.z) + abs(low)
        centre = (
            SIGMAS * np.sqrt(len(self.w)) * means.mean(1, keepdims=True) * self.spec.center_rows
        )
        error = abs(kept) * self.ratio.shrink_full + centre * self.mask[:, None]
        return self.scales.spectral * np.stack([kept + low, error])

    def _check_best(self, dz):
        """Were the last chosen logit and the next apart by its rounding, either could be chosen."""
        k = self.spec.top_k
        if k:
            last, following = np.sort(self.z)[:, [-k, -k - 1]].T
            assert ((last == following) | (last - following > 4 * U * dz.max())).all()


def _p_error(s):
    return s.p * (s.p_full + SIGMAS * s.spread)


def _centred(array, axis):
    return array - array.mean(axis, keepdims=True)
