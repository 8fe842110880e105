import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from balora_jax.errors import InputError
from balora_jax.numerics import linalg
from balora_jax.numerics.head import check, head_loss, plain_head_loss
from balora_jax.numerics.head_types import LINEAR, LogitMap, Rows
from tests.numerics.head_settings import TERMS, Scales, Settings, flat

N, D, V = 11, 6, 23
SCALES = Scales(0.3, 0.7, 1.1, 2.5)  # one weight for each term of the loss
FULL = Settings()
NONE = Settings(on=(), teacher_entropy=False)


def adapt(scales, mean_entropy):
    """A stand-in for the adaptive weight: any function of the mean entropy of the teacher."""
    return scales | {"consistency": 0.2 + mean_entropy["consistency"]}


@functools.partial(jax.jit, static_argnames=("spec", "chunk", "logit_map", "plain"))
def JITTED(rows, head, spec, *, chunk, factor, logit_map, plain):
    if plain:
        return plain_head_loss(
            rows, head, SCALES.by_name, spec.chosen, logit_map=logit_map, adapt=adapt
        )
    return head_loss(
        rows, head, SCALES.by_name, spec.chosen, chunk=chunk, factor=factor, logit_map=logit_map,
        adapt=adapt,
    )  # fmt: skip


@dataclasses.dataclass
class Batch:
    student: np.ndarray
    teacher: np.ndarray
    head: np.ndarray
    labels: np.ndarray
    label_mask: np.ndarray
    term_mask: np.ndarray

    def loss(self, spec, *, student=None, teacher="own", chunk=4, factor=True, dtype=jnp.float32,
             logit_map=LINEAR, plain=False):  # fmt: skip
        """The weighted loss, and the terms."""
        rows = Rows(
            jnp.asarray(self.student if student is None else student, dtype),
            jnp.asarray(self.teacher, dtype) if isinstance(teacher, str) else teacher,
            jnp.asarray(self.labels),
            jnp.asarray(self.label_mask),
            jnp.asarray(self.term_mask),
        )
        centred = linalg.head_factor(self.head, center=spec.center_rows)
        return JITTED(
            rows,
            jnp.asarray(self.head, dtype),
            spec,
            chunk=chunk,
            factor=jnp.asarray(centred) if factor else None,
            logit_map=logit_map,
            plain=plain,
        )

    def terms(self, spec, **options):
        return flat(self.loss(spec, **options)[1])


@pytest.fixture
def batch(rng):
    label_mask = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0], bool)
    return Batch(
        student=rng.standard_normal((N, D)),
        teacher=rng.standard_normal((N, D)),
        head=rng.standard_normal((V, D)),
        labels=np.where(label_mask, rng.integers(0, V, N), -100).astype(np.int32),
        label_mask=label_mask,
        term_mask=np.roll(label_mask, 1),
    )


def reference(batch, spec, student=None, logit_map=LINEAR, head=None):
    """All terms from full float64 logits with plain loops; the student's own head if it trains."""

    def capped(products):
        cap, products = logit_map.soft_cap, logit_map.scale * products
        return products if cap is None else cap * np.tanh(products / cap)

    student_head = batch.head if head is None else head
    z_s = capped((batch.student if student is None else student) @ student_head.T)
    z_t = capped(batch.teacher @ batch.head.T)

    def log_softmax(row):
        return row - row.max() - np.log(np.exp(row - row.max()).sum())

    def entropy(row):
        return -(np.exp(log_softmax(row)) * log_softmax(row)).sum()

    task = consistency = diversity = teacher_entropy = 0.0
    for i in range(N):
        if batch.label_mask[i]:
            task -= log_softmax(z_s[i])[batch.labels[i]]
        if batch.term_mask[i]:
            t, s = log_softmax(z_t[i] / spec.temperature), log_softmax(z_s[i] / spec.temperature)
            consistency += spec.temperature**2 * (np.exp(t) * (t - s)).sum()
            diversity -= entropy(np.sort(z_s[i])[::-1][: spec.top_k or V])
            teacher_entropy += entropy(z_t[i] / spec.temperature)
    kept = z_s[batch.term_mask]
    if spec.center_rows:
        kept = kept - kept.mean(1, keepdims=True)
    s = np.linalg.svd(kept, compute_uv=False)
    size = np.sqrt((s**2).sum()) if spec.norm == "frobenius" else s.sum()
    return [
        task,
        batch.label_mask.sum(),
        consistency,
        diversity,
        batch.term_mask.sum(),
        teacher_entropy,
        -s[: spec.k].sum() / size,
        0.0,
    ]


def reference_parts(batch, spec, student=None, logit_map=LINEAR, head=None):
    """The weighted parts of the loss."""
    found = reference(batch, spec, student, logit_map, head)
    task, _, kl, diversity, count, entropy, spectral, _ = found
    consistency = 0.2 + entropy / count if spec.teacher_entropy else SCALES.consistency
    parts = (
        SCALES.task * task, consistency * kl, SCALES.diversity * diversity,
        SCALES.spectral * spectral,
    )  # fmt: skip
    return np.array(parts)


def reference_loss(*arguments, **options):
    return reference_parts(*arguments, **options).sum()


def assert_loss(loss, parts):
    """To the error of the parts, some of which are negative: their sum is smaller than they are."""
    np.testing.assert_allclose(loss, parts.sum(), rtol=0, atol=1e-6 * abs(parts).sum())


def reference_gradient(batch, spec, logit_map=LINEAR):
    """Central differences of the weighted float64 reference."""
    return differences(batch.student, lambda x: reference_loss(batch, spec, x, logit_map))


def differences(at, value):
    gradient = np.zeros(at.shape)
    for index in np.ndindex(*at.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = at.copy()
            moved[index] += step
            sides.append(value(moved))
        gradient[index] = (sides[0] - sides[1]) / 2e-6
    return gradient


SETTINGS = {
    "published": {},
    "arxiv_v1": {"temperature": 1.0, "top_k": 0, "norm": "nuclear"},
    "centred": {"center_rows": True},
    "centred_nuclear": {"center_rows": True, "norm": "nuclear", "k": 1},
}


MAPS = {
    "linear": LINEAR,
    "capped": LogitMap(soft_cap=2.0),
    "scaled": LogitMap(scale=1.3),
    "scaled and capped": LogitMap(soft_cap=2.0, scale=0.6),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("setting", "logit_map"),
    [
        *[(setting, "linear") for setting in SETTINGS],
        *[("published", name) for name in MAPS if name != "linear"],
        ("centred", "capped"),
        ("centred", "scaled"),
        ("arxiv_v1", "scaled"),
    ],
)
def test_values_and_gradient_match_full_float64_logits(batch, setting, logit_map, plain):
    spec, mapping = dataclasses.replace(FULL, **SETTINGS[setting]), MAPS[logit_map]
    (loss, got), gradient = jax.jit(
        jax.value_and_grad(
            lambda student: batch.loss(spec, student=student, logit_map=mapping, plain=plain),
            has_aux=True,
        )
    )(jnp.asarray(batch.student, jnp.float32))
    got = flat(got)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in (loss, *got))
    np.testing.assert_allclose(got, reference(batch, spec, logit_map=mapping), rtol=1e-6)
    assert_loss(loss, reference_parts(batch, spec, logit_map=mapping))
    expected = reference_gradient(batch, spec, mapping)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("setting", "logit_map", "plain"),
    [
        ("published", "linear", False),
        ("published", "linear", True),
        ("arxiv_v1", "linear", True),
        ("centred", "linear", False),
        ("centred", "capped", False),
        ("published", "capped", True),
    ],
)
def test_a_head_that_trains_has_a_gradient_and_the_teacher_its_own(
    batch, rng, setting, logit_map, plain
):
    spec, mapping = dataclasses.replace(FULL, **SETTINGS[setting]), MAPS[logit_map]
    trained = batch.head + 0.3 * rng.standard_normal((V, D))
    rows = Rows(
        *(jnp.asarray(x, jnp.float32) for x in (batch.student, batch.teacher)),
        *(jnp.asarray(x) for x in (batch.labels, batch.label_mask, batch.term_mask)),
    )
    options = {"logit_map": mapping, "adapt": adapt, "original": jnp.asarray(batch.head, "float32")}
    if not plain:
        options["chunk"] = 4

    @jax.jit
    def both(student, head):
        def loss(student, head):
            call = plain_head_loss if plain else head_loss
            return call(
                rows._replace(student=student), head, SCALES.by_name, spec.chosen, **options
            )

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(student, head)

    (loss, got), gradients = both(rows.student, jnp.asarray(trained, jnp.float32))
    exact = functools.partial(reference_loss, batch, spec, logit_map=mapping)
    wanted = reference(batch, spec, logit_map=mapping, head=trained)
    np.testing.assert_allclose(flat(got)[:-1], wanted[:-1], rtol=1e-6)
    assert_loss(loss, reference_parts(batch, spec, logit_map=mapping, head=trained))
    places = ((batch.student, lambda x: exact(x, head=trained)), (trained, lambda x: exact(head=x)))
    for gradient, (at, value) in zip(gradients, places, strict=True):
        expected = differences(at, value)
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * abs(expected).max())


def test_an_untouched_head_that_trains_has_exactly_zero_divergence(batch):
    spec = dataclasses.replace(NONE, on=("consistency",))
    head = jnp.asarray(batch.head, jnp.float32)
    rows = Rows(
        *[jnp.asarray(batch.student, jnp.float32)] * 2, jnp.asarray(batch.labels),
        jnp.zeros(N, bool), jnp.asarray(batch.term_mask),
    )  # fmt: skip
    for call, options in ((head_loss, {"chunk": 4}), (plain_head_loss, {})):
        value, gradient = jax.value_and_grad(
            lambda head, call=call, options=options: call(
                rows, head, SCALES.by_name, spec.chosen, original=head + 0,
                **options,
            )[0]
        )(head)  # fmt: skip
        assert value == 0
        assert not np.any(gradient)


def test_a_head_that_trains_has_one_vocabulary_with_the_teacher(batch):
    head = jnp.asarray(batch.head, jnp.float32)
    rows = Rows(
        *[jnp.asarray(batch.student, jnp.float32)] * 2, jnp.asarray(batch.labels),
        jnp.asarray(batch.label_mask), jnp.asarray(batch.term_mask),
    )  # fmt: skip
    with pytest.raises(InputError, match="expected the teacher's head in the shape"):
        check(rows, head, FULL.chosen, 4, None, LINEAR, head[:-1])
    nuclear = dataclasses.replace(FULL, norm="nuclear").chosen
    with pytest.raises(InputError, match="or the head trains, got nuclear"):
        head_loss(rows, head, SCALES.by_name, nuclear, chunk=4, original=head)


@pytest.mark.parametrize("chunk", [1, 5, 11, 512])
def test_chunk_size_does_not_matter(batch, chunk):
    np.testing.assert_allclose(batch.terms(FULL, chunk=chunk), reference(batch, FULL), rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_hidden_states_have_exactly_zero_divergence(batch, chunk, dtype):
    spec = dataclasses.replace(NONE, on=("consistency",))
    batch.label_mask = np.zeros(N, bool)

    def loss(student):
        teacher = jnp.asarray(batch.student, dtype)
        return batch.loss(spec, student=student, teacher=teacher, chunk=chunk, dtype=dtype)

    (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jnp.asarray(batch.student, dtype)
    )
    assert value == terms.terms["consistency"] == 0.0
    assert terms.term_count == batch.term_mask.sum()
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), 0)


def test_bfloat16_hidden_states_accumulate_in_float32(batch):
    def rounded(array):
        return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)

    exact = dataclasses.replace(
        batch,
        student=rounded(batch.student),
        teacher=rounded(batch.teacher),
        head=rounded(batch.head),
    )
    got = exact.terms(FULL, dtype=jnp.bfloat16)
    assert all(value.dtype == jnp.float32 for value in got)
    np.testing.assert_allclose(got, reference(exact, FULL), rtol=2e-6)
    gradient = jax.grad(lambda s: exact.loss(FULL, student=s, dtype=jnp.bfloat16)[0])(
        jnp.asarray(exact.student, jnp.bfloat16)
    )
    assert gradient.dtype == jnp.bfloat16
    expected = reference_gradient(exact, FULL)
    # Each entry of d loss / d logits is rounded once (2^-9), and the result once more.
    bound = 2**-8 * (abs(expected).max() + abs(exact.head).sum(0).max())
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, atol=bound)


@pytest.mark.parametrize(
    ("change", "places"),
    [
        ({"on": ("diversity", "spectral"), "teacher_entropy": False}, [2, 5]),
        ({"on": ("consistency", "spectral")}, [3]),
        ({"on": ("consistency", "diversity")}, [6]),
        ({"teacher_entropy": False}, [5]),
    ],
)
def test_a_term_left_out_is_zero_and_the_others_stay(batch, change, places):
    got = np.array(batch.terms(dataclasses.replace(FULL, **change)))
    expected = np.array(reference(batch, FULL))
    assert np.all(got[places] == 0)
    assert np.all(expected[places] != 0)
    np.testing.assert_allclose(np.delete(got, places), np.delete(expected, places), rtol=1e-6)


def program(batch, spec, **options):
    return str(jax.make_jaxpr(lambda s: batch.terms(spec, student=s, **options))(batch.student))


def test_terms_left_out_are_absent_from_the_program(batch):
    products = {}
    for name, spec in {
        "none": NONE,
        **{term: dataclasses.replace(NONE, on=(term,)) for term in TERMS},
    }.items():
        text = program(batch, spec)
        products[name] = text.count("dot_general")
        assert ("top_k" in text) == (name == "diversity")
        assert ("svd" in text) == (name == "spectral")
    assert products["none"] == products["diversity"] == 2  # student logits, and the gradient
    assert products["consistency"] == 3  # and the teacher's: N·D·V three times
    assert products["spectral"] > 2


def test_no_array_of_all_logits_exists(batch):
    """With the factor no array of the program, forward or backward, is N x V."""
    spec, rows, chunk = FULL, 32, 4
    big = Batch(
        student=np.ones((rows, D)),
        teacher=np.zeros((rows, D)),
        head=np.eye(101, D) + 0.1,
        labels=np.zeros(rows, np.int32),
        label_mask=np.ones(rows, bool),
        term_mask=np.ones(rows, bool),
    )

    def loss(student):
        return big.loss(spec, student=student, chunk=chunk)[0]

    text = jax.jit(jax.grad(loss)).lower(jnp.asarray(big.student, jnp.float32)).as_text()
    assert f"tensor<{chunk}x101xf32>" in text
    for shape in (f"{rows}x101", f"{rows // chunk}x{chunk}x101"):
        assert f"tensor<{shape}xf32>" not in text


def test_teacher_and_head_receive_no_gradient(batch):
    def total(teacher, head, plain):
        rows = Rows(
            jnp.asarray(batch.student, jnp.float32),
            teacher,
            jnp.asarray(batch.labels),
            jnp.asarray(batch.label_mask),
            jnp.asarray(batch.term_mask),
        )
        factor = jnp.asarray(linalg.head_factor(batch.head))
        return JITTED(
            rows, head, FULL, chunk=4, factor=factor, logit_map=LINEAR, plain=plain
        )[0]  # fmt: skip

    for plain in (False, True):
        for gradient in jax.grad(total, argnums=(0, 1))(
            jnp.asarray(batch.teacher, jnp.float32), jnp.asarray(batch.head, jnp.float32), plain
        ):
            np.testing.assert_array_equal(gradient, 0)


def test_rows_outside_both_masks_may_be_nan(batch):
    spoiled = dataclasses.replace(batch)
    unused = ~(batch.label_mask | batch.term_mask)
    assert unused.any()
    spoiled.student = np.where(unused[:, None], np.nan, batch.student)
    spoiled.teacher = np.where(unused[:, None], np.inf, batch.teacher)
    np.testing.assert_allclose(spoiled.terms(FULL), reference(batch, FULL), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: spoiled.loss(FULL, student=s)[0]))(
        jnp.asarray(spoiled.student, jnp.float32)
    )
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[unused], 0)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_nothing_counted_is_zero_with_zero_gradient(batch, norm):
    spec = dataclasses.replace(FULL, norm=norm)
    batch.label_mask = batch.term_mask = np.zeros(N, bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: batch.loss(spec, student=s)[0]))(
        jnp.asarray(batch.student, jnp.float32)
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("plain", [True, False])
def test_no_rows(batch, plain):
    empty = Batch(
        batch.student[:0], batch.teacher[:0], batch.head, batch.labels[:0], *[np.zeros(0, bool)] * 2
    )
    assert [float(value) for value in empty.terms(FULL, plain=plain)] == [0.0] * 8


def test_one_row_and_duplicated_rows(batch):
    for rows in ([3], [3, 3, 3, 3]):
        few = Batch(
            batch.student[rows],
            batch.teacher[rows],
            batch.head,
            batch.labels[rows],
            *np.ones((2, len(rows)), bool),
        )
        spec = dataclasses.replace(NONE, on=("spectral",))
        few.label_mask[:] = False

        def spectral(student, few=few, spec=spec):
            return few.loss(spec, student=student)[0]

        value, gradient = jax.jit(jax.value_and_grad(spectral))(
            jnp.asarray(few.student, jnp.float32)
        )
        np.testing.assert_allclose(value, -SCALES.spectral, rtol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_gradient_matches_finite_differences_in_float64(x64, batch):
    def loss(student):
        return batch.loss(FULL, student=student, dtype=jnp.float64)[0]

    check_grads(jax.jit(loss), (jnp.asarray(batch.student),), 1, ["rev"], rtol=1e-6)


def message(call):
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def test_messages(batch, type_checks_off):
    assert message(lambda: batch.terms(FULL, teacher=None)) == (
        "head_loss: expected teacher hidden states of shape (11, 6) for the consistency term, "
        "got None. Run the teacher or set consistency to 0."
    )
    assert message(lambda: batch.terms(FULL, chunk=0)) == (
        "head_loss: expected chunk of at least 1, got 0. Use 512 or more."
    )
    assert message(lambda: batch.terms(dataclasses.replace(FULL, top_k=24))) == (
        "head_loss: expected top_k between 0 (all) and the 23 columns of the logits, got 24. "
        "Lower it."
    )
    assert message(lambda: batch.terms(dataclasses.replace(FULL, temperature=0.0))) == (
        "head_loss: expected a temperature above 0, got 0.0. The published value is 2."
    )
    assert message(lambda: batch.terms(dataclasses.replace(FULL, norm="l1"))) == (
        "head_loss: expected norm frobenius or nuclear, got 'l1'. Choose one of them."
    )
    assert message(lambda: batch.terms(dataclasses.replace(FULL, k=0))) == (
        "head_loss: expected k of at least 1, got 0. The published value is 10."
    )
    # A top_k beyond the vocabulary of a term that is off, and an unused teacher, do not matter.
    unused = dataclasses.replace(NONE, top_k=24)
    assert batch.terms(unused, teacher=None)[1] == batch.label_mask.sum()


def test_shape_messages(batch, type_checks_off):
    wide = dataclasses.replace(batch, student=batch.student[:, :5])
    assert message(lambda: wide.terms(FULL)) == (
        "head_loss: expected hidden states [N, D] and a head [V, D] of one width D, got "
        "(11, 5) and (23, 6). Flatten batch and time, do not transpose W."
    )
    short = dataclasses.replace(batch, labels=batch.labels[:4])
    assert message(lambda: short.terms(FULL)) == (
        "head_loss: expected labels, label_mask and term_mask of shape (11,), got "
        "(4,), (11,) and (11,). Flatten them alike."
    )
    assert message(lambda: batch.terms(FULL, factor=False)) == (
        "head_loss: expected a factor of shape (6, 6) for the spectral term, got None. Make it "
        "with linalg.head_factor from the same head."
    )
    nuclear = dataclasses.replace(FULL, norm="nuclear")
    assert message(lambda: batch.terms(nuclear, logit_map=MAPS["capped"])) == (
        "head_loss: expected norm frobenius where logits have a soft cap or the head trains, got "
        "nuclear, which needs all singular values of [N, V]. Change the norm, or set training.head to plain."
    )
