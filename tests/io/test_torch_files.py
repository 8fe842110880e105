"""Files that torch wrote, against torch's own reading; and those that are no such file."""

import collections
import os
import random
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch

from balora_jax.errors import InputError
from balora_jax.io.torch_files import open_torch
from tests.io.torch_refusal import refused

ROW = {"_use_new_zipfile_serialization": False}
HOW = {
    "zip": {},
    "row": ROW,
    "zip 5": {"pickle_protocol": 5},
    "row 4": {"pickle_protocol": 4, **ROW},
}


def tensors():
    """Views of every kind over shared storages, in every dtype, as state dicts may hold them."""
    base = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = collections.OrderedDict(
        whole=base,
        part=base[3:20:2, 1:5:3],
        turned=base.t(),
        cube=base.view(4, 10, 6).permute(2, 0, 1)[1:, 2:],
        row=torch.nn.Parameter(base[7]),
        one=torch.tensor(3.5),
        none=torch.zeros(0, 3),
        position_ids=torch.arange(9).expand((1, -1)),
        yes=torch.tensor([True, False, True]),
    )
    for name in ("bfloat16", "float16", "float64"):
        found[name] = base.to(getattr(torch, name))
    for name in ("int64", "int32", "int16", "int8", "uint8"):
        found[name] = torch.arange(100, 110).to(getattr(torch, name))
    found._metadata = collections.OrderedDict({"": {"version": 1}})
    return found


DTYPES = {
    "whole": "F32", "yes": "BOOL", "bfloat16": "BF16", "float16": "F16", "float64": "F64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_every_view_in_every_dtype_is_as_torch_reads_it(tmp_path, how):
    file = tmp_path / "pytorch_model.bin"
    wanted = tensors()
    torch.save(wanted, file, **HOW[how])
    with open_torch(file) as handle:
        assert list(handle.keys()) == list(wanted)
        for name, want in wanted.items():
            part, want = handle.get_slice(name), want.detach()
            assert tuple(part.get_shape()) == tuple(want.shape)
            assert part.get_dtype() == DTYPES.get(name, part.get_dtype())
            got = handle.get_tensor(name)
            assert got.flags.c_contiguous
            assert got.flags.owndata  # and no view of the mapped file
            np.testing.assert_array_equal(got.astype(np.float64), want.double().numpy(), name)
            if want.dim() == 2 and want.numel():
                index = (slice(1, 3), slice(0, 2))
                np.testing.assert_array_equal(
                    part[index].astype(np.float64), want[index].double().numpy(), name
                )


def written(file, **how):
    torch.save({"a": torch.arange(6.0), "b": torch.arange(600.0)}, file, **how)
    return file


@pytest.mark.parametrize("how", ["zip", "row"])
@pytest.mark.parametrize("keep", [0, 3, 40, 200, -3000, -500, -1])
def test_a_truncated_file(tmp_path, how, keep):
    file = written(tmp_path / "a.bin", **HOW[how])
    file.write_bytes(file.read_bytes()[:keep])
    refused(file)


def rewritten(file, change):
    """The records of a zip archive, by name and content, changed and written anew."""
    with zipfile.ZipFile(file) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, *kind in change([(n.partition("/")[2], c) for n, c in records]):
            name = name if "/" in name and not name.startswith("data/") else f"archive/{name}"
            archive.writestr(name, content, *kind)


def instead(name, content, *kind):
    def change(records):
        return [(n, content, *kind) if n == name else (n, c) for n, c in records]

    return change


BOMB = b"\0" * 2**22
ARCHIVES = {
    "compressed pickle": (instead("data.pkl", BOMB, zipfile.ZIP_DEFLATED), "compressed"),
    "compressed storage": (instead("data/1", bytes(2400), zipfile.ZIP_DEFLATED), "compressed"),
    "compressed order": (instead("byteorder", BOMB, zipfile.ZIP_LZMA), "compressed"),
    "large pickle": (instead("data.pkl", bytes(2**24 + 1)), "data.pkl of more than 16777216"),
    "large order": (instead("byteorder", bytes(2**24 + 1)), "byteorder of more than 16777216"),
    "big endian": (instead("byteorder", b"big"), "not in little-endian order"),
    "order of noise": (instead("byteorder", b"\xff"), "not in little-endian order"),
    "short storage": (instead("data/1", bytes(2399)), "2399 bytes of the storage 1 for 600"),
    "no storage": (lambda r: [x for x in r if x[0] != "data/1"], "no record of the storage 1"),
    "no pickle": (lambda r: [x for x in r if x[0] != "data.pkl"], "archive without a data.pkl"),
    "two pickles": (lambda r: [*r, ("b/data.pkl", b"\x80\x02}.")], "without a data.pkl"),
    "nothing": (lambda r: [], "archive without a data.pkl"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_torch_would_not_write(tmp_path, name):
    change, reason = ARCHIVES[name]
    file = written(tmp_path / "a.bin")
    rewritten(file, change)
    if name == "nothing":
        assert "a pickle that is broken" in refused(file)  # an archive starts with a record
    else:
        assert reason in refused(file)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_records_of_one_name(tmp_path):
    file = written(tmp_path / "a.bin")
    rewritten(file, lambda records: [*records, ("data/1", bytes(2400))])
    assert "two records of one name" in refused(file)


def central(file, name):
    """Where the directory at the end of a zip archive describes a record."""
    content = bytearray(file.read_bytes())
    at = content.rindex(b"/" + name)
    return content, content.rindex(b"PK\x01\x02", 0, at)


DIRECTORY = {
    "encrypted": (8, "<H", 1, "compressed or encrypted"),
    "another place": (42, "<I", 7, "where it should be"),
    "beyond the file": (42, "<I", 2**31, "where it should be"),
    "longer than the file": (20, "<II", 2**31, "beyond the file"),
    "two sizes": (24, "<I", 2**31, "compressed or encrypted"),
    "version": (6, "<H", 99, "a zip archive that is broken"),
}


@pytest.mark.parametrize("name", DIRECTORY)
def test_a_directory_that_lies(tmp_path, name):
    offset, form, value, reason = DIRECTORY[name]
    file = written(tmp_path / "a.bin")
    rewritten(file, lambda records: records)
    content, at = central(file, b"data/1")
    struct.pack_into(form, content, at + offset, *[value] * (len(form) - 1))
    file.write_bytes(content)
    assert reason in refused(file)


@pytest.mark.parametrize("place", [-1, 2**63])
def test_a_place_that_no_file_has(tmp_path, monkeypatch, place):
    file = written(tmp_path / "a.bin")
    listed = zipfile.ZipFile.infolist

    def changed(archive):
        found = listed(archive)
        next(info for info in found if info.filename.endswith("data/1")).header_offset = place
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", changed)
    refused(file)


def test_storages_over_one_another(tmp_path):
    file = written(tmp_path / "a.bin")
    rewritten(file, lambda records: records)
    content, at = central(file, b"data/1")
    _, other = central(file, b"data/0")
    content[at + 42 : at + 46] = content[other + 42 : other + 46]
    file.write_bytes(content)
    assert "two storages that overlap" in refused(file)


ROWS = {
    "another number": (b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x18"),
    "another protocol": (b"M\xe9\x03", b"M\xe8\x03"),
    "big endian": (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
    "another count": (struct.pack("<q", 600), struct.pack("<q", 601)),
    "negative count": (struct.pack("<q", 600), struct.pack("<q", -1)),
    "other keys": (b"]q\x00(X", b"]q\x00(N"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_pickles_that_torch_would_not_write(tmp_path, name):
    file = written(tmp_path / "a.bin", **ROW)
    content = file.read_bytes()
    assert ROWS[name][0] in content
    file.write_bytes(content.replace(*ROWS[name]))
    refused(file)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"state_dict": {"a": torch.ones(2)}}, "type dict under the name state_dict"),
        ({"a": torch.ones(2), "epoch": 3}, "type int under the name epoch"),
        ([torch.ones(2)], "type list in place of a dict of tensors"),
        (torch.ones(2), "a tensor in place of a dict of tensors"),
        ({"a": torch.ones(2).to_sparse()}, "the name torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "the name torch.ComplexFloatStorage"),
        ({3: torch.ones(2)}, "a value of type int as a key"),
        ({"a": torch.ones(1).expand(3)}, "a tensor whose numbers overlap"),
        ({"a": torch.nn.Linear(2, 2)}, "the name torch.nn.modules.linear.Linear"),
    ],
)
def test_other_things_that_torch_saves(tmp_path, value, reason):
    for how in ("zip", "row"):
        torch.save(value, tmp_path / "a.bin", **HOW[how])
        assert reason in refused(tmp_path / "a.bin")


def test_no_file_and_other_files(tmp_path):
    assert "No such file" in refused(tmp_path / "gone.bin")
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"PK\x03\x04" * 99):
        (tmp_path / "a.bin").write_bytes(content)
        refused(tmp_path / "a.bin")


def test_a_file_that_changes_while_it_is_open(tmp_path):
    file = written(tmp_path / "a.bin")
    with open_torch(file) as handle:
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"as before, got .* Let nothing write to it"):
            handle.get_tensor("a")


@pytest.mark.parametrize("how", ["zip", "row"])
def test_bytes_changed_anywhere_are_refused_or_read(tmp_path, how):
    """``BALORA_BAD_INPUTS=all`` tries a hundred times as many."""
    file = written(tmp_path / "a.bin", **HOW[how])
    whole = file.read_bytes()
    rng = random.Random(0)
    tries = 20_000 if os.environ.get("BALORA_BAD_INPUTS") == "all" else 200
    outcomes = collections.Counter()
    for _ in range(tries):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            content[at] = rng.choice([0, 255, 127, rng.randrange(256), content[at] ^ 1])
        file.write_bytes(content)
        try:
            with open_torch(file) as handle:
                sizes = [handle.get_tensor(name).size for name in handle.keys()]  # noqa: SIM118
            assert sum(sizes) <= len(whole)
            outcomes["read"] += 1
        except InputError as error:
            outcomes["refused" if str(error).isprintable() else "unprintable"] += 1
    assert not outcomes["unprintable"]
    assert min(outcomes["read"], outcomes["refused"]) > tries // 50
    shutil.rmtree(tmp_path)
