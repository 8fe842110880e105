"""Tokens on a mesh that splits them, and what is refused. No devices are needed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.parallel import axes, sharding, token_split
from balora_jax.tasks.text import loss as text_loss
from balora_jax.tasks.text.program import check_rows_whole


def mesh(data=1, fsdp=1, sequence=1, tensor=1, expert=1):
    names = ("data", "fsdp", "expert", "sequence", "tensor")
    return AbstractMesh((data, fsdp, expert, sequence, tensor), names)


ROWS = ("data", "fsdp", "expert")


def config(**model):
    return parse_config(
        {
            "model": {"name_or_path": "unread", **model},
            "data": {"train": "unread"},
            "training": {"max_steps": 1, "batch_size": 4},
            "eval": {"task": "none"},
        },
        "test",
    )


def test_batches_split_rows_and_tokens():
    assert sharding.batch_sharding(mesh(sequence=2)).spec == P(None, ROWS, "sequence")
    # Without, so that labels [micro-batches, B] may be placed by it too.
    assert sharding.batch_sharding(mesh(fsdp=2)).spec == P(None, ROWS)
    assert sharding.head_axes(mesh(fsdp=2, sequence=2)).rows == ("fsdp", "sequence")
    assert sharding.head_axes(mesh(fsdp=2, tensor=2)).rows == ("fsdp",)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 3), (2, 2, 3), (1, 1, 2)])
def test_every_device_keeps_its_own_tokens(sizes):
    """Range d of the flat rows is the block of device d, by a loop over devices."""
    data, fsdp, parts = sizes
    values = np.random.default_rng(0).integers(0, 1000, (8, 6, 5))
    flatten = sharding.flatten_tokens(mesh(*sizes, tensor=2))
    found = np.asarray(flatten(jnp.asarray(values)))
    assert np.asarray(flatten(jnp.asarray(values[..., 0]))).tolist() == found[:, 0].tolist()
    rows, tokens = 8 // (data * fsdp), 6 // parts
    for device, (i, j, k) in enumerate(np.ndindex(data, fsdp, parts)):
        first = (i * fsdp + j) * rows
        block = values[first : first + rows, k * tokens : (k + 1) * tokens]
        size = rows * tokens
        own = found[device * size : (device + 1) * size]
        np.testing.assert_array_equal(own, block.reshape(size, 5))


def test_whole_tokens_are_flattened_row_by_row():
    x = jnp.arange(24).reshape(2, 3, 4)
    for flatten in (text_loss.merged, sharding.flatten_tokens(mesh(fsdp=2))):
        assert flatten(x).tolist() == x.reshape(6, 4).tolist()


def test_targets_come_in_the_order_of_the_rows():
    ids = jnp.arange(8).reshape(1, 8)
    batch = {"input_ids": ids, "segment_ids": jnp.ones_like(ids), "loss_mask": ids % 3}
    flatten = sharding.flatten_tokens(mesh(sequence=2))
    plain, found = (
        text_loss.targets_of(batch, "official"),
        text_loss.targets_of(batch, "official", flatten),
    )
    for one, other in zip(plain, found, strict=True):
        assert one.tolist() == other.tolist()  # one row: its halves follow each other


def test_a_row_is_rounded_up_to_a_multiple():
    assert sharding.round_up_length(16, 24, mesh(sequence=3)) == 18
    assert sharding.round_up_length(15, 15, mesh(sequence=3)) == 15
    assert sharding.round_up_length(16, 16, mesh(tensor=3)) == 16
    message = (
        "data.max_length: expected a multiple of mesh.sequence = 3, got 17: tokens of a row are "
        "split evenly. Change one of them."
    )
    with pytest.raises(InputError) as error:
        sharding.round_up_length(16, 17, mesh(sequence=3))
    assert str(error.value) == message


def test_the_fused_attention_takes_whole_rows():
    message = "model.attention: expected auto or xla with mesh.sequence 2, got cudnn, which takes"
    with pytest.raises(InputError, match=message):
        check_rows_whole(config(attention="cudnn").model, mesh(sequence=2))
    with pytest.raises(InputError, match="got blocks, which takes whole rows only"):
        check_rows_whole(config(attention="blocks").model, mesh(sequence=2))
    check_rows_whole(config(attention="xla").model, mesh(sequence=2))
    check_rows_whole(config(attention="cudnn").model, mesh(fsdp=2))


def test_one_mesh_axis_in_two_dimensions_is_refused(monkeypatch):
    monkeypatch.setitem(axes.MESH_AXES, "heads", "fsdp")
    message = (
        "axes.MESH_AXES: expected every mesh axis in one dimension of an array, got fsdp in two of "
        "layers.attn.c_proj.{} {}. Give one of these logical axes another mesh axis, or None."
    )
    for leaf, logical in (
        ("kernel", ("layers", "heads", "width")),
        ("kernel_scale", ("layers", "blocks_heads", "width")),
    ):
        with pytest.raises(InputError) as error:
            sharding.spec_of(f"layers.attn.c_proj.{leaf}", logical)
        assert str(error.value) == message.format(leaf, logical)
    # Adapters have axes of their own.
    assert tuple(sharding.spec_of("lora_b", ("layers", None, "adapter_width"))) == (
        None,
        None,
        ("fsdp", "sequence"),
    )


def layout(**sizes):
    named = {
        "embed_tokens.embedding": ("vocabulary", "width"),
        "layers.up.kernel_scale": ("layers", "blocks_width", "inner"),
    }
    return sharding.Layout(named, mesh(**sizes))


def test_blocks_that_do_not_divide_lie_whole():
    found = layout(fsdp=4, tensor=2)
    assert found("layers.up.kernel_scale", (3, 8, 6)).spec == P(
        None, ("fsdp", "sequence"), "tensor"
    )
    assert found("layers.up.kernel_scale", (3, 1, 6)).spec == P(None, None, "tensor")
    with pytest.raises(
        InputError, match=r"mesh.tensor: expected a divisor of 5, an axis of layers"
    ):
        found("layers.up.kernel_scale", (3, 8, 5))


def test_an_axis_that_does_not_divide_names_the_sizes_at_fault():
    message = (
        r"mesh.fsdp x mesh.sequence: expected a divisor of 12, an axis of embed_tokens.embedding "
        r"\(48, 12\), got 8. Choose another size"
    )
    with pytest.raises(InputError, match=message):
        layout(fsdp=2, sequence=4)("embed_tokens.embedding", (48, 12))
    with pytest.raises(InputError, match=r"^mesh.sequence: expected a divisor of 12"):
        layout(sequence=8)("embed_tokens.embedding", (48, 12))


def test_a_mesh_that_splits_no_tokens_leaves_products_as_they_are():
    x = jnp.ones((2, 3, 4))
    assert token_split.parts() == 1
    assert token_split.gather_tokens(x) is x
    assert token_split.as_rows(x).shape == (6, 4)
    assert token_split.as_tokens(jnp.ones((6, 5)), (2, 3)).shape == (2, 3, 5)
    found = str(jax.make_jaxpr(lambda x: token_split.as_rows(token_split.gather_tokens(x)))(x))
    assert "sharding_constraint" not in found
