import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import LAYERS, LINEAR, make_llama, rules

from balora_jax.errors import InputError
from balora_jax.io import hf_files, hf_weights
from balora_jax.io.hf_weights import (
    find_checkpoint,
    fingerprint,
    load_weights,
    read_json_config,
)
from balora_jax.models.weight_names import WeightRule
from tests import compiler


def targets(dtype=jnp.float32):
    shapes = {
        "embed_tokens.embedding": (64, 32),
        "norm.scale": (32,),
        "lm_head.embedding": (64, 32),
        "layers.input_layernorm.scale": (LAYERS, 32),
        "layers.post_attention_layernorm.scale": (LAYERS, 32),
    }
    shapes |= {f"layers.{name}.kernel": (LAYERS, *shape) for name, shape in LINEAR.items()}
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}


def expected(model):
    """The arrays by path, from torch's state dict alone."""
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    out = {
        "embed_tokens.embedding": state["model.embed_tokens.weight"],
        "norm.scale": state["model.norm.weight"],
        "lm_head.embedding": state["lm_head.weight"],
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        names = [f"model.layers.{i}.{norm}.weight" for i in range(LAYERS)]
        out[f"layers.{norm}.scale"] = np.stack([state[n] for n in names])
    for linear in LINEAR:
        names = [f"model.layers.{i}.{linear}.weight" for i in range(LAYERS)]
        out[f"layers.{linear}.kernel"] = np.stack([state[n].T for n in names])
    return out


@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_loads_what_transformers_saved(tmp_path, shard_size, stored, wanted):
    model = make_llama(stored)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "40KB")
    loaded = load_weights(find_checkpoint(str(tmp_path)), targets(wanted), rules())
    assert list(loaded) == list(targets())
    for path, value in expected(model).items():
        assert loaded[path].dtype == wanted
        np.testing.assert_array_equal(loaded[path], value.astype(wanted), err_msg=path)


def save_torch(folder, state, count, **how):
    """A state dict as torch saves it, in one file or in several under names of one's own."""
    import torch

    (folder / "config.json").write_text("{}")
    if count == 1:
        torch.save(state, folder / "pytorch_model.bin", **how)
        return
    names = [f"{chr(97 + i % count)}.part {i % count}.bin" for i in range(len(state))]
    for file in set(names):
        part = {k: v for (k, v), name in zip(state.items(), names, strict=True) if name == file}
        torch.save(part, folder / file, **how)
    index = {"metadata": {}, "weight_map": dict(zip(state, names, strict=True))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_loads_what_torch_saved(tmp_path, count, zipped, stored):
    model = make_llama(stored)
    save_torch(tmp_path, model.state_dict(), count, _use_new_zipfile_serialization=zipped)
    loaded = load_weights(find_checkpoint(str(tmp_path)), targets(), rules())
    for path, value in expected(model).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


def test_safetensors_win_where_both_are_there(llama, llama_folder, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    loaded = load_weights(find_checkpoint(tmp_path), targets(), rules())
    np.testing.assert_array_equal(loaded["norm.scale"], expected(llama)["norm.scale"])


def test_torch_pieces_smaller_than_a_tensor(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "_PIECE_BYTES", 7 * 32 * 4)
    turned = {n: v.T.clone().T if v.dim() == 2 else v for n, v in llama.state_dict().items()}
    save_torch(tmp_path, turned, 1)
    loaded = load_weights(tmp_path, targets(), rules())
    for path, value in expected(llama).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


def test_pieces_smaller_than_a_tensor_give_the_same_bytes(llama, llama_folder, monkeypatch):
    monkeypatch.setattr(hf_weights, "_PIECE_BYTES", 7 * 32 * 4)
    loaded = load_weights(llama_folder, targets(), rules())
    for path, value in expected(llama).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


SHARDED = """
import json, sys, tracemalloc
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file
from balora_jax.io import hf_files, hf_weights
from balora_jax.models.weight_names import WeightRule

folder = sys.argv[1]
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
def struct(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
targets = {
    "layers.up.kernel": struct((4, 1024, 2048), None, "fsdp", "data"),
    "layers.down.kernel": struct((4, 2048, 1024), "data", None, "fsdp"),
    "embed.embedding": struct((4096, 512), "fsdp", None),
    "norm.scale": struct((512,)),
}
rules = [
    WeightRule("layers.up.kernel", "up.{i}.weight", True),
    WeightRule("layers.down.kernel", "down.{i}.weight", True),
    WeightRule("embed.embedding", "embed.weight", False),
    WeightRule("norm.scale", "norm.weight", False),
]
read = {}
largest = 0
class Part:
    def __init__(self, name, part):
        self.name, self.part = name, part
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype
    def __getitem__(self, index):
        global largest
        value = self.part[index]
        read[self.name] = read.get(self.name, 0) + value.nbytes
        largest = max(largest, value.nbytes)
        return value
class Handle:
    def __init__(self, handle):
        self.handle, self.keys = handle, handle.keys
    def get_slice(self, name):
        return Part(name, self.handle.get_slice(name))
    def __enter__(self):
        opened.append(self)
        return self
    def __exit__(self, *_):
        opened.remove(self)
opened = []
real = hf_files.safe_open
hf_files.safe_open = lambda *a, **k: Handle(real(*a, **k))
as_read = hf_weights.load_weights(folder, targets, rules)
# A CPU device takes a host buffer over as its own memory; put blocks together as an accelerator
# does, whose memory is not counted here either. Once before, for the programs.
hf_weights.on_host = lambda places: False
hf_weights.load_weights(folder, targets, rules)
read, largest = {}, 0
tracemalloc.start()
loaded = hf_weights.load_weights(folder, targets, rules)
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
stored = load_file(folder + "/model.safetensors")
for path, array in loaded.items():
    rule = next(r for r in rules if r.path == path)
    if rule.stacked:
        whole = np.stack([stored[rule.name.replace("{i}", str(i))].T for i in range(4)])
    else:
        whole = stored[rule.name]
    assert array.sharding == targets[path].sharding
    assert array.dtype == jnp.bfloat16
    for shard, other in zip(array.addressable_shards, as_read[path].addressable_shards, strict=True):
        wanted = whole[shard.index].astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(shard.data), wanted)
        np.testing.assert_array_equal(np.asarray(other.data), wanted)
print(json.dumps({
    "devices": jax.device_count(),
    "read": read,
    "stored": {k: v.nbytes for k, v in stored.items()},
    "largest": largest,
    "peak": peak,
    "open": len(opened),
}))
"""


def test_eight_devices_read_each_number_once_and_only_their_slices(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"up.{i}.weight": rng.standard_normal((2048, 1024), np.float32) for i in range(4)}
    arrays |= {f"down.{i}.weight": rng.standard_normal((1024, 2048), np.float32) for i in range(4)}
    arrays |= {"embed.weight": rng.standard_normal((4096, 512), np.float32)}
    arrays |= {"norm.weight": np.ones(512, np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    environment = os.environ | compiler.on_cpu(8)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["devices"] == 8
    # Two copies of a block (replicated over "data") are one read.
    assert figures["read"] == figures["stored"]
    # Never more than a quarter of one layer at a time.
    assert figures["largest"] <= 2048 * 1024 * 4 // 4
    # Five pieces of an eighth of the largest tensor (8 MiB as stored), and what the programs that
    # write them take; a stack has 16 MiB in bfloat16, the model 36.
    assert figures["peak"] < 1.2 * 8 * 2**20
    assert figures["open"] == 0


def test_one_report_names_every_misfit(llama_folder, tmp_path):
    state = load_file(llama_folder / "model.safetensors")
    del state["model.norm.weight"]
    del state["model.layers.11.mlp.up_proj.weight"]
    state["model.layers.3.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    state["model.layers.3.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    state["lm_head.weight"] = np.zeros((65, 32), np.float32)
    state["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), ml_dtypes.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_weights(tmp_path, targets(), rules())
    assert str(caught.value) == (
        f"{tmp_path}: expected the {3 + 9 * LAYERS} tensors that its config describes, got "
        "2 missing (model.layers.11.mlp.up_proj.weight, model.norm.weight); "
        "1 unexpected (model.layers.3.self_attn.q_proj.bias); "
        "1 misshaped (lm_head.weight is [65, 32], expected [64, 32]); "
        "1 of a dtype other than F64/F32/F16/BF16 (model.layers.0.mlp.up_proj.weight is F8_E4M3). "
        "Use the config.json and the unquantised weights that belong together."
    )


def test_a_long_report_is_shortened(llama_folder, tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"got 111 missing .* … and 103 more\); 1 unexpected"):
        load_weights(tmp_path, targets(), rules())


def test_ignored_names_may_be_left_over(llama_folder):
    wanted = targets()
    del wanted["lm_head.embedding"]
    with pytest.raises(InputError, match=r"1 unexpected \(lm_head.weight\)"):
        load_weights(llama_folder, wanted, rules())
    loaded = load_weights(llama_folder, wanted, rules(), ignore=(r"^lm_head\.",))
    assert "lm_head.embedding" not in loaded


def test_a_target_without_rule_is_a_mistake_of_the_program(llama_folder):
    with pytest.raises(ValueError, match="no weight rule names these parameters: nowhere"):
        load_weights(llama_folder, {"nowhere": jax.ShapeDtypeStruct((1,), jnp.float32)}, rules())


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file_is_named(llama_folder, tmp_path, keep):
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for read in (lambda: load_weights(tmp_path, targets(), rules()), lambda: fingerprint(tmp_path)):
        with pytest.raises(InputError, match=r"model\.safetensors: expected a complete saf"):
            read()


@pytest.mark.parametrize(
    "outside",
    [
        "../other.safetensors",
        "/etc/x.safetensors",
        "a/../../x",
        "C:\\x.safetensors",
        "..\\x.safetensors",
    ],
)
def test_index_that_points_outside_is_refused(tmp_path, outside):
    index = {"weight_map": {"norm.weight": outside}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected files of its own folder"):
        load_weights(tmp_path, targets(), rules())


def test_index_with_a_missing_shard_or_no_map(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"expected 1 weight files, got 1 missing \(model-1"):
        load_weights(tmp_path, {}, [])
    for inside in ("sub/a.safetensors", "./a.safetensors", "sub\\a.safetensors", ".", ""):
        index.write_text(json.dumps({"weight_map": {"a": inside}}))
        with pytest.raises(InputError, match=r"expected files beside it, got '.*Move the weights"):
            load_weights(tmp_path, {}, [])
    index.write_text("{}")
    with pytest.raises(InputError, match="expected a weight_map of names to files"):
        load_weights(tmp_path, {}, [])


def test_links_to_blobs_as_in_the_hub_cache_are_read(llama, llama_folder, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in llama_folder.iterdir():
        shutil.copy(file, tmp_path / f"blob-{file.name}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blob-{file.name}")
    loaded = load_weights(find_checkpoint(tmp_path / "snapshot"), targets(), rules())
    np.testing.assert_array_equal(loaded["norm.scale"], expected(llama)["norm.scale"])


def test_folders_that_are_no_checkpoint(tmp_path):
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c", "~/absent-folder"):
        with pytest.raises(InputError, match="expected a checkpoint folder, got nothing"):
            find_checkpoint(name)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="expected a checkpoint folder, got a file"):
        find_checkpoint(file)
    with pytest.raises(InputError, match=r"expected config\.json, got none"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"index of either, got no weights\. Convert it once"):
        find_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(InputError, match=r"got only tf_model\.h5.*safe_serialization=True"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="expected no revision for a local folder, got 'v1'"):
        find_checkpoint(tmp_path, "v1")


def hub_error(kind):
    error = kind.__new__(kind)  # the constructors want a response of one HTTP library
    error.args = ("said the hub\nand more",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hf_files.GatedRepoError), "expected access to this gated repository"),
        (hub_error(hf_files.RevisionNotFoundError), "expected an existing revision, got 'v9'"),
        (hub_error(hf_files.RepositoryNotFoundError), "a Hub repository, got neither"),
        (hf_files.HFValidationError("bad"), "a Hub repository, got neither"),
        (hf_files.LocalEntryNotFoundError("offline"), "cached copy or a reachable Hub"),
        (OSError("disk full"), "expected to download it, got 'disk full'"),
        (hub_error(hf_files.HTTPError), "expected to download it, got"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf_files, "snapshot_download", fail)
    with pytest.raises(InputError, match=message) as caught:
        find_checkpoint("someone/model", "v9")
    assert "\n" not in str(caught.value)


COMMIT = "0123456789" * 4
SHARDS = ["model-00001-of-00002.safetensors", "b[1].safetensors"]
TORCH_SHARDS = ["pytorch_model_00001-of-00002.bin", "b.bin"]
PLAIN = ["config.json", "tokenizer.model", "tokenizer.json", "vocab.txt", "chat_template.jinja"]
NEVER = [
    "modeling_x.py", "consolidated.safetensors", "original/model.safetensors", "tf_model.h5",
    "original/params.json", "training_args.bin", "pytorch_model.generator.bin", "b1.safetensors",
]  # fmt: skip
REPOSITORIES = {
    "one file": ["model.safetensors"],
    "one file of each kind": ["model.safetensors", "pytorch_model.bin"],
    "shards": ["model.safetensors.index.json", *SHARDS],
    "both kinds": [
        *("model.safetensors.index.json", *SHARDS),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", *TORCH_SHARDS),
    ],
    "torch's file": ["pytorch_model.bin"],
    "torch's shards": ["pytorch_model.bin.index.json", *TORCH_SHARDS],
}
NOT_WANTED = {
    "one file of each kind": ["pytorch_model.bin"],
    "both kinds": ["pytorch_model.bin", *TORCH_SHARDS],
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_hub_download_takes_the_weights_that_are_read_and_nothing_else(monkeypatch, tmp_path, name):
    from huggingface_hub.utils import filter_repo_objects

    repository = [*PLAIN, *REPOSITORIES[name], *NEVER]
    folder = tmp_path / COMMIT
    folder.mkdir()
    revisions = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        revisions.append(revision)
        for file in filter_repo_objects(
            repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            files = TORCH_SHARDS if file.startswith("pytorch") else SHARDS
            weight_map = {f"tensor.{i}": shard for i, shard in enumerate(files)}
            (folder / file).write_text(json.dumps({"weight_map": weight_map}))
        return str(folder)

    monkeypatch.setattr(hf_files, "snapshot_download", download)
    assert find_checkpoint("someone/model", "main") == folder
    wanted = {*PLAIN, *REPOSITORIES[name]} - set(NOT_WANTED.get(name, ()))
    assert {file.name for file in folder.iterdir()} == wanted
    # What follows is of the commit that the first call found.
    assert revisions == ["main", COMMIT][: 1 if "one file" in name else 2]


def test_without_weights_only_the_config_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(hf_files, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    assert find_checkpoint("someone/model", weights=False) == tmp_path
    assert asked["allow_patterns"] == ["config.json"]
    with pytest.raises(InputError, match="got no weights"):
        find_checkpoint("someone/model")


def test_config_is_read_or_named(llama_folder, tmp_path):
    assert read_json_config(llama_folder)["num_hidden_layers"] == LAYERS
    with pytest.raises(InputError, match="expected a readable file, got No such file"):
        read_json_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON, got"):
        read_json_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object, got list"):
        read_json_config(tmp_path)


def test_fingerprint_of_a_small_model_sees_every_weight(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    first = fingerprint(tmp_path)
    assert first == fingerprint(llama_folder)
    assert len(first) == 64
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    second = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_fingerprint_of_a_large_model_samples_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "_HASH_WHOLE_BYTES", 1000)
    monkeypatch.setattr(hf_files, "_SAMPLE_BYTES", 16)
    (tmp_path / "config.json").write_text("{}")

    def of(values, name="a"):
        save_file({name: values}, tmp_path / "model.safetensors")
        return fingerprint(tmp_path)

    values = np.arange(4000, dtype=np.float32)
    seen = {of(values), of(values, "b"), of(values.reshape(2, -1)), of(values + 1)}
    for place in (0, 3999):
        changed = values.copy()
        changed[place] += 1
        seen.add(of(changed))
    assert len(seen) == 6
    changed = values.copy()
    changed[30] += 1  # byte 120: between the samples, as the docstring says
    assert of(changed) == of(values)


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint_of_torch_files(tmp_path, monkeypatch, whole):
    import torch

    monkeypatch.setattr(hf_files, "_HASH_WHOLE_BYTES", 10**6 if whole else 0)
    monkeypatch.setattr(hf_files, "_SAMPLE_BYTES", 16)

    def of(values, name="a"):
        save_torch(tmp_path, {name: torch.tensor(values)}, 1)
        return fingerprint(tmp_path)

    values = np.arange(4000, dtype=np.float32)
    first = of(values)
    assert first == of(values)
    seen = {first, of(values, "b"), of(values.reshape(2, -1)), of(values + 1), of(values[:-1])}
    assert len(seen) == 5
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(
        InputError, match=r"pytorch_model\.bin: expected a complete file of tensors"
    ):
        fingerprint(tmp_path)


def test_rule_knows_its_stack():
    assert WeightRule("a", "x.{i}.w", True).stacked
    assert not WeightRule("a", "x.w", True).stacked
