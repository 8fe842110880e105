"""The encoders against transformers, in float32, with every config field off its default."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from balora_jax.models.adapters import AdapterShape, adapter_shapes, plan_adapters
from balora_jax.models.disentangled import DisentangledConfig, table_rows
from balora_jax.models.families.base import family_of, weight_rules
from balora_jax.models.structure import structure
from balora_jax.models.variables import HeadParam
from balora_jax.models.weight_names import linear_shapes
from tests.models import tiny_encoders as tiny
from tests.models.tiny_encoders import relative_error

TOLERANCE = 1e-4
FAMILIES = (tiny.bert, tiny.roberta, tiny.deberta, tiny.distilbert, tiny.modernbert)
TYPED = (tiny.bert, tiny.roberta, tiny.deberta)
TYPES = (["c2p"], ["p2c"], ["p2c", "c2p"])


def ids_of(model, batch=3, length=29, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(4, model.config.vocab_size, (batch, length))


def padded(model, ids):
    """One row padded on the left, one on the right, one not at all."""
    mask = np.ones_like(ids)
    mask[0, :6], mask[1, -7:] = 0, 0
    return np.where(mask == 1, ids, model.config.pad_token_id), mask


def check(model, ids, mask=None, types=None):
    """Logits of every row, and hidden states of every token that is not padding."""
    want, want_hidden = tiny.torch_outputs(model, ids, mask, types)
    got, hidden = tiny.outputs(*tiny.ours(model), ids, mask, types)
    real = np.ones_like(ids, bool) if mask is None else mask == 1
    assert got.dtype == jnp.float32
    assert got.shape == (len(ids), model.config.num_labels)
    assert np.isfinite(hidden).all()
    assert np.ptp(want, axis=0).max() > 0.1  # else the texts would hardly be told apart
    error = relative_error(got, want)
    assert error < TOLERANCE
    assert relative_error(np.asarray(hidden)[real], want_hidden[real]) < TOLERANCE
    return error


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_with_padding_on_either_side(family, labels):
    model = family(num_labels=labels)
    check(model, *padded(model, ids_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_every_token_counts(family, record_property):
    model = family()
    error = check(model, ids_of(model))
    record_property("parity", f"{model.config.model_type}: {error:.1e}")


@pytest.mark.parametrize("family", TYPED)
def test_token_types(family):
    model = family(type_vocab_size=3)
    ids, mask = padded(model, ids_of(model))
    types = np.random.default_rng(5).integers(0, 3, ids.shape)
    check(model, ids, mask, types)
    plain, _ = tiny.torch_outputs(model, ids, mask)
    assert relative_error(plain, tiny.torch_outputs(model, ids, mask, types)[0]) > 1e-2


def test_roberta_counts_positions_by_token_whatever_the_mask_says():
    """A padding token that the mask keeps, and a hidden token that is not padding."""
    model = tiny.roberta()
    ids = ids_of(model)
    ids[:, 9] = tiny.config_of(model).pad_token_id
    mask = np.ones_like(ids)
    mask[:, 17] = 0
    check(model, ids, mask)


@pytest.mark.parametrize("buckets", [8, -1])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kinds", TYPES)
def test_deberta_attention(kinds, share, buckets):
    """Longer than the buckets are exact, and than the clipped distances without buckets."""
    reach = 12 if buckets < 0 else -1
    model = tiny.deberta(
        pos_att_type=kinds,
        share_att_key=share,
        position_buckets=buckets,
        max_relative_positions=reach,
        num_hidden_layers=2,
    )
    check(model, *padded(model, ids_of(model, length=38)))


@pytest.mark.parametrize(
    ("normed", "biased", "types"),
    list(itertools.product(("layer_norm", "none"), (True, False), (0, 2))),
)
def test_deberta_embeddings(normed, biased, types):
    model = tiny.deberta(
        norm_rel_ebd=normed,
        position_biased_input=biased,
        type_vocab_size=types,
        num_hidden_layers=2,
        hidden_act="silu",
        pooler_hidden_act="gelu",
    )
    check(model, *padded(model, ids_of(model, length=17)))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_deberta_on_the_shortest_texts(length):
    model = tiny.deberta(num_hidden_layers=2)
    check(model, ids_of(model, length=length))


def test_deberta_options_change_the_logits():
    """Else the parity would also hold for code, and tests, that ignore them."""
    model = tiny.deberta()
    ids = ids_of(model, length=38)
    want, _ = tiny.torch_outputs(model, ids)
    for field, value in {"pos_att_type": ["c2p"], "max_relative_positions": 9}.items():
        other = tiny.deberta(**{field: value})
        other.load_state_dict(model.state_dict())
        assert relative_error(tiny.torch_outputs(other, ids)[0], want) > 1e-2, field


@pytest.mark.parametrize(
    ("buckets", "reach"),
    [
        (buckets, reach)
        for buckets in (2, 3, 6, 8, 10, 32, 256)
        for reach in (17, 40, 81, 130, 512)
        if buckets // 2 < reach - 1  # else refused by encoder_config
    ],
)
def test_rows_of_every_distance_equal_transformers(buckets, reach):
    config = DisentangledConfig(buckets, reach, True, ("c2p",), False, False)
    tokens = reach + 20
    distance = torch.arange(1 - tokens, tokens)
    bucket = make_log_bucket_position(distance, buckets, reach).long()
    want = (bucket + buckets).clamp(0, 2 * buckets - 1)
    np.testing.assert_array_equal(table_rows(config, tokens), want.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_padding_alone_is_finite_and_leaves_the_others_alone(family):
    model = family()
    ids, mask = padded(model, ids_of(model))
    ids[2], mask[2] = model.config.pad_token_id, 0
    skeleton, weights = tiny.ours(model)
    got, hidden = tiny.outputs(skeleton, weights, ids, mask)
    assert np.isfinite(got).all()
    assert np.isfinite(hidden).all()
    want, _ = tiny.torch_outputs(model, ids[:2], mask[:2])
    assert relative_error(got[:2], want) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_head_compose_to_the_logits(family):
    model = family()
    skeleton, weights = tiny.ours(model)
    ids, mask = padded(model, ids_of(model))

    @jax.jit
    def forward(weights, ids, mask):
        module = skeleton.bind(weights)
        features = module.features(ids, mask)
        return features, module.head_logits(features)

    features, logits = forward(weights, ids, mask)
    want, want_hidden = tiny.torch_outputs(model, ids, mask)
    first = want_hidden[:, 0]
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        share = mask / mask.sum(axis=1, keepdims=True)
        first = np.einsum("bt,btd->bd", share, want_hidden)
    assert relative_error(features, first) < TOLERANCE
    assert relative_error(logits, want) < TOLERANCE


MODERN = {
    "the first token": {"classifier_pooling": "cls"},
    "no biases": {"attention_bias": False, "mlp_bias": False},
    "other layers": {"layer_types": [*["full_attention", "sliding_attention"] * 2, "full_attention"]},
    "one layer": {"num_hidden_layers": 1},
    "a wider window": {"local_attention": 13},
    "another base": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 90.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
        }
    },
    "both scaled": {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("case", MODERN)
def test_modernbert(case):
    model = tiny.modernbert(**MODERN[case])
    ids, mask = padded(model, ids_of(model))
    check(model, ids, mask)
    usual, _ = tiny.torch_outputs(tiny.modernbert(), ids, mask)
    assert relative_error(usual, tiny.torch_outputs(model, ids, mask)[0]) > 1e-2


RANK, ALPHA = 3, 5.0


LAYERS = {
    tiny.deberta: ["query_proj", "value_proj"],
    tiny.modernbert: ["Wqkv", "mlp.Wo"],
    tiny.distilbert: ["k_lin", "lin2"],
}


@pytest.fixture(scope="module", params=LAYERS)
def adapted(request):
    """A model with random adapters on two of its layers, full rematerialisation."""
    model = request.param(num_hidden_layers=3)
    plain, weights = tiny.ours(model)
    modules = plan_adapters(
        linear_shapes(weight_rules(tiny.config_of(model)), plain.frozen),
        rank=RANK,
        alpha=ALPHA,
        target_modules=LAYERS[request.param],
    )
    shapes = adapter_shapes(modules, origin=False, dropout=0.5)
    skeleton = structure(tiny.config_of(model), adapters=shapes, remat="full")
    rng = np.random.default_rng(4)
    factors = {
        path: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in skeleton.adapters.items()
    }
    scales = {path: jnp.full((3,), ALPHA / RANK) for path in skeleton.origin}
    return model, skeleton, weights, modules, factors, scales


def torch_gradient(model, modules, factors, ids, mask):
    """Gradients by name of the factors and of the head; ``s·B A`` is added to the weights."""
    state = dict(model.named_parameters())
    sides = {}
    for module in modules:
        for side in "ab":
            value = np.asarray(factors[f"{module.path}.lora_{side}"][module.layer])
            sides[module.path, module.layer, side] = torch.tensor(value, requires_grad=True)
        down, up = (sides[module.path, module.layer, side] for side in "ab")
        name = f"{module.name}.weight"
        state[name] = state[name].detach() + module.scale * (down @ up).T
    model.zero_grad()
    logits = torch.func.functional_call(
        model, state, kwargs={"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    ).logits
    torch.tanh(0.3 * logits).sum().backward()
    head = {rule.path: rule for rule in family_of(tiny.config_of(model)).head_rules()}
    parameters = dict(model.named_parameters())
    head = {path: parameters[rule.name].grad.numpy().T for path, rule in head.items()}
    return {key: value.grad.numpy() for key, value in sides.items()}, head


def test_gradient_of_adapters_and_head_equals_torch_under_full_remat(adapted):
    model, skeleton, weights, modules, factors, scales = adapted
    ids, mask = map(jnp.asarray, padded(model, ids_of(model, length=21)))
    head = {path: weights[path] for path in skeleton.head}
    frozen = {path: weights[path] for path in skeleton.frozen}

    @jax.jit
    def gradient(factors, head, frozen):
        def loss(factors, head):
            logits = skeleton.bind(frozen, scales, factors, head)(ids, mask)
            return jnp.sum(jnp.tanh(0.3 * logits))

        return jax.grad(loss, argnums=(0, 1))(factors, head)

    got, got_head = gradient(factors, head, frozen)
    want, want_head = torch_gradient(model, modules, factors, ids, mask)
    assert len(want) == 2 * 2 * 3
    pairs = {
        key: (got["{}.lora_{}".format(*key[::2])][key[1]], value) for key, value in want.items()
    }
    pairs |= {path: (got_head[path], value) for path, value in want_head.items()}
    for name, (ours, theirs) in pairs.items():
        largest = np.abs(theirs).max()
        assert largest > 1e-4, name
        assert np.abs(np.asarray(ours) - theirs).max() < TOLERANCE * largest, name


def test_dropout_of_the_adapters_follows_its_key(adapted):
    model, skeleton, weights, _, factors, scales = adapted
    ids, mask = map(jnp.asarray, padded(model, ids_of(model, length=21)))

    @jax.jit
    def forward(key):
        return skeleton.bind(weights, scales, factors)(ids, mask, dropout_key=key)

    off, one, again, two = (
        np.asarray(forward(key)) for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )  # fmt: skip
    np.testing.assert_array_equal(one, again)
    assert relative_error(one, off) > 1e-2
    assert relative_error(two, one) > 1e-2


def test_bfloat16_keeps_head_and_logits_in_float32():
    model = tiny.deberta()
    skeleton, weights = tiny.ours(model, dtype="bfloat16")
    assert {leaf.dtype for leaf in skeleton.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in skeleton.head.values()} == {jnp.dtype(jnp.float32)}
    cast = {
        path: value.astype(jnp.bfloat16) if path in skeleton.frozen else value
        for path, value in weights.items()
    }
    ids, mask = padded(model, ids_of(model))
    got, hidden = tiny.outputs(skeleton, cast, ids, mask)
    assert (got.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(got, tiny.torch_outputs(model, ids, mask)[0]) < 0.1


def test_parts_of_the_structure_are_disjoint_and_the_head_is_marked():
    path = "layers.attention.self.query"
    config = tiny.config_of(tiny.bert())
    skeleton = structure(config, adapters={path: AdapterShape(2, True)})
    assert set(skeleton.adapters) == {f"{path}.lora_a", f"{path}.lora_b"}
    assert set(skeleton.origin) == {f"{path}.{name}" for name in ("lora_scale", "origin_a", "origin_b")}  # fmt: skip
    assert skeleton.head["head.out.kernel"].shape == (24, 3)
    parts = (skeleton.frozen, skeleton.adapters, skeleton.origin, skeleton.head)
    shapes = {key: leaf for part in parts for key, leaf in part.items()}
    assert len(shapes) == sum(map(len, parts))
    module = skeleton.bind({key: jnp.zeros(leaf.shape, leaf.dtype) for key, leaf in shapes.items()})
    assert isinstance(module.head.dense.kernel, HeadParam)
