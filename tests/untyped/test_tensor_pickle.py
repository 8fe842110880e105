"""Pickles that would run code, or never end, where a dict of tensors is expected."""

import collections
import copyreg
import io
import pickle
import struct
import time
import zipfile

import pytest
import torch

from balora_jax.io.torch_files import open_torch
from balora_jax.untyped import tensor_pickle
from balora_jax.untyped.tensor_pickle import UnfitError, read_tensors, read_value
from tests.io.torch_refusal import refused


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def short(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


MKDIR = b"cposix\nmkdir\n"


class Set:
    """A class of the sort that an attacker looks for: its state is a path to be made."""

    def __setstate__(self, path):
        import os

        os.mkdir(path)


def makes(name):
    """Pickles that make the folder ``name`` when Python reads them."""
    path = text(name)
    mine = f"c{__name__}\nSet\n".encode()
    partial = b"cfunctools\npartial\n"
    return {
        "reduce": b"\x80\x02" + MKDIR + path + b"\x85R.",
        "stack global": b"\x80\x04" + short("posix") + short("mkdir") + b"\x93" + path + b"\x85R.",
        "inst": b"(" + path + b"iposix\nmkdir\n.",
        "obj": b"(" + MKDIR + path + b"o.",
        "newobj": b"\x80\x02" + partial + MKDIR + b"\x85\x81" + path + b"\x85R.",
        "newobj ex": b"\x80\x04" + partial + MKDIR + b"\x85}\x92" + path + b"\x85R.",
        "extension": b"\x80\x02\x82\xf1" + path + b"\x85R.",
        "build": b"\x80\x02" + mine + b")\x81" + path + b"b.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncposix\n_exit\ncposix\nmkdir\n0"
        b"0c__main__\n__builtins__\n0" + MKDIR + path + b"\x85R.",
        "dotted": b"\x80\x04" + short("collections")
        + short("_sys.modules.__class__.__name__.__len__") + b"\x930" + MKDIR + path + b"\x85R.",
        "eval": b"\x80\x02cbuiltins\neval\n"
        + text(f"__import__('os').mkdir({name!r})") + b"\x85R.",
        "map": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\n" + MKDIR + path + b"\x85\x86R\x85R.",
        "within": b"\x80\x02}" + text("weight") + MKDIR + path + b"\x85Rs.",
        "as a key": b"\x80\x02}" + MKDIR + path + b"\x85RNs.",
        "dropped": b"\x80\x02" + MKDIR + path + b"\x85R0}.",
        "behind a dict": b"\x80\x02}" + text("a") + b"Ns0" + MKDIR + path + b"\x85R.",
        "by import": b"\x80\x02cpydoc\nlocate\n" + text("os.mkdir") + b"\x85R" + path + b"\x85R.",
    }  # fmt: skip


def torch_zip(file, pickled, **records):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in records.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", content)


@pytest.mark.parametrize("name", makes(""))
def test_what_runs_in_python_runs_nothing_here(tmp_path, name):
    made = tmp_path / "made"
    pickled = makes(str(made))[name]
    if name == "extension":
        copyreg.add_extension("posix", "mkdir", 0xF1)
    try:
        for how in ("zip", "row", "row's last"):
            file = tmp_path / f"{how}.bin"
            if how == "zip":
                torch_zip(file, pickled)
            elif how == "row":
                file.write_bytes(pickled)
            else:
                torch.save({}, file, _use_new_zipfile_serialization=False)
                file.write_bytes(file.read_bytes()[:-1] + pickled)
            refused(file)
            assert not made.exists()
        # The same bytes, so that a reader which runs anything would fail above. Some of these
        # end in an error, behind what they have done.
        try:
            pickle.loads(pickled)
        except (AttributeError, pickle.UnpicklingError):
            pytest.skip("Python runs nothing of it either")
        assert made.is_dir()
    finally:
        if name == "extension":
            copyreg.remove_extension("posix", "mkdir", 0xF1)


def storage(count=6, key="0", kind="FloatStorage", last=b""):
    words = (b"(" + text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu"))
    return b"".join(words) + pickle.dumps(count, 2)[2:-1] + last + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), held=None, more=b""):
    held = storage() if held is None else held
    numbers = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides))
    function = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return function + held + numbers + b"\x89ccollections\nOrderedDict\n)R" + more + b"tR"


def state(*values):
    items = b"".join(text(f"w{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


DOUBLED = b"\x80\x02)" + b"q\x00h\x00\x86" * 60
HOSTILE = {
    "memo bomb as a key": (b"\x80\x02}" + DOUBLED[2:] + b"Ns.", "a value of type tuple as a key"),
    "memo bomb as a value": (b"\x80\x02}" + text("a") + DOUBLED[2:] + b"s.", "under the name a"),
    "memo bomb": (DOUBLED + b".", "a value of type tuple in place of a dict"),
    "nested lists": (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "type list in place"),
    "nested tuples": (b"\x80\x02)" + b"\x85" * 90_000 + b".", "type tuple in place"),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "type list in place"),
    "dict in itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "type dict under the name a"),
    "endless": (b"\x80\x02" + b")0" * 10 + b"]" * 300_000, "the pickle instruction POP"),
    "many instructions": (b"\x80\x02" + b"N" * 300_000, "of more than 200000 instructions"),
    "huge text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.", "a pickle that is broken"),
    "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.", "a pickle that is broken"),
    "huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}", "a pickle that is broken"),
    "huge number": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1), "a pickle that is broken"),
    "long number": (b"\x80\x02\x8b\xff\xff\x00\x00" + b"\x7f" * 65535 + b".", "instruction LONG4"),
    "digits": (b"L" + b"9" * 100_000 + b"L\n.", "a pickle that is broken"),
    "high memo": (b"\x80\x02}r\xff\xff\xff\xff0.", "the pickle instruction POP"),
    "unknown memo": (b"\x80\x02h\x05.", "asks for what it did not keep"),
    "empty stack": (b"\x80\x02\x85.", "takes from an empty stack"),
    "below a mark": (b"\x80\x02)(\x85.", "takes from an empty stack"),
    "no mark": (b"\x80\x02)t.", "misses a mark"),
    "no value of a key": (b"\x80\x02}(" + text("a") + b"u.", "a key that has no value"),
    "two values": (b"\x80\x02}}.", "leaves something over"),
    "no end": (b"\x80\x02}", "a pickle that is broken"),
    "no pickle": (b"\xff\xfe", "a pickle that is broken"),
    "nothing": (b"", "a pickle that is broken"),
    "surrogates": (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.", "with unprintable ones"),
    "escape": (b"\x80\x02}" + text("a\x1b[2J\n") + b"Ns.", "with unprintable ones"),
    "long name": (b"\x80\x02}" + text("a" * 1001) + tensor() + b"s.", "more than 1000 characters"),
    "text reference": (b"P7\n.", "the pickle instruction PERSID"),
    "reference to a module": (b"\x80\x02(" + text("module") + b"NNNtQ.", "other than a storage"),
    "buffer": (b"\x80\x05\x97.", "the pickle instruction NEXT_BUFFER"),
    "attributes": (b"\x80\x02}}" + text("x") + b"Nsb.", "that sets attributes"),
    "attributes of a tensor": (b"\x80\x02" + tensor() + b"}b.", "fills a tensor as a dict"),
    "calls a dict": (b"\x80\x02})R.", "calls a value of type dict"),
    "calls a storage's class": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls a name"),
    "arguments are a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls a name"),
    "not a function": (b"\x80\x02](]tR.", "calls a value of type list"),
    "a tuple as OrderedDict": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "with arguments"),
    "a name": (b"\x80\x02ctorch\nFloatStorage\n.", "a name in place of a dict"),
    "another name": (b"\x80\x02ctorch\nload\n.", "the name torch.load"),
    "another function of torch": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "_sparse_"),
    "names are numbers": (b"\x80\x04K\x01K\x02\x93.", "whose names are no text"),
    "name with a line": (b"\x80\x04" + short("posix\nx") + short("m") + b"\x93.", r"posix\nx.m"),
    "a storage": (state(storage()), "a storage under the name w0"),
    "a number": (state(b"K\x01"), "a value of type int under the name w0"),
    "a dict": (state(b"}" + text("x") + tensor() + b"s"), "type dict under the name w0"),
    "offset outside": (state(tensor(offset=1)), "a tensor that reaches 7 of 6"),
    "shape outside": (state(tensor(shape=(3, 3))), "a tensor that reaches 9 of 6"),
    "stride outside": (state(tensor(strides=(4, 1))), "a tensor that reaches 7 of 6"),
    "empty outside": (state(tensor(offset=7, shape=(0, 3))), "a tensor that reaches 7 of 6"),
    "negative offset": (state(tensor(offset=-1)), "that is no count"),
    "negative size": (state(tensor(shape=(-2, 3))), "that is no count"),
    "negative stride": (state(tensor(offset=5, strides=(-3, -1))), "that is no count"),
    "boolean size": (state(tensor(shape=(True, 3))), "that is no count"),
    "huge size": (state(tensor(shape=(10**30, 3))), "that is no count"),
    "great size": (state(tensor(shape=(2**61, 3))), "a tensor that reaches"),
    "size that wraps": (state(tensor(shape=(2**32, 2**32), strides=(2**32, 1))), "reaches"),
    "zero strides": (state(tensor(shape=(9**9, 9**9), strides=(0, 0))), "numbers overlap"),
    "equal strides": (state(tensor(shape=(3, 3), strides=(1, 1))), "numbers overlap"),
    "fewer strides": (state(tensor(strides=(1,))), "a tensor whose description is broken"),
    "many dimensions": (state(tensor(shape=(1,) * 99, strides=(1,) * 99)), "description is broken"),
    "no storage": (state(tensor(held=b"N")), "a tensor whose description is broken"),
    "marks": (state(tensor(more=b"}" + text("conj") + b"\x88s")), "a tensor whose description"),
    "storage of two kinds": (
        state(tensor(), tensor(held=storage(kind="IntStorage"))), "two descriptions"),
    "storage of two sizes": (state(tensor(), tensor(held=storage(7))), "two descriptions"),
    "storage of complex": (state(tensor(held=storage(kind="ComplexFloatStorage"))), "the name"),
    "count of text": (state(tensor(held=storage("6"))), "whose description is broken"),
    "negative count": (state(tensor(held=storage(-6))), "whose description is broken"),
    "count beyond its record": (state(tensor(held=storage(7))), "24 bytes of the storage 0 for 7"),
    "great count": (state(tensor(held=storage(2**61))), "24 bytes of the storage 0"),
    "a view of a storage": (
        state(tensor(held=storage(last=text("x")))), "other than a storage"),
    "storage elsewhere": (
        state(tensor(held=storage(key="../../version"))), "no record of the storage ../../version"),
    "parameter of nothing": (
        state(b"ctorch._utils\n_rebuild_parameter\n(N\x89NtR"), "a parameter that is no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_pickle_is_one_sentence(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tensor_pickle, "_MOST_STEPS", 200_000)  # types are checked here: slow
    pickled, reason = HOSTILE[name]
    torch_zip(tmp_path / "a.bin", pickled, data_0=bytes(24), version=b"3\n")
    began = time.process_time()
    assert reason in refused(tmp_path / "a.bin")
    assert time.process_time() - began < 8


def test_the_pieces_of_these_pickles_are_good(tmp_path):
    """What is refused above is refused for its fault alone."""
    good = state(
        tensor(), tensor(strides=(1, 2)), tensor(offset=5, shape=(), strides=()),
        tensor(shape=(1, 2), strides=(2**61, 1)),
    )  # fmt: skip
    torch_zip(tmp_path / "a.bin", good, data_0=struct.pack("<6f", *range(6)), version=b"3\n")
    with open_torch(tmp_path / "a.bin") as handle:
        got = {name: handle.get_tensor(name).tolist() for name in ("w0", "w1", "w2", "w3")}
    assert got == {
        "w0": [[0, 1, 2], [3, 4, 5]], "w1": [[0, 2, 4], [1, 3, 5]], "w2": 5, "w3": [[0, 1]]
    }  # fmt: skip
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert {name: value.tolist() for name, value in loaded.items()} == got


def test_plain_values_are_those_of_pickle():
    value = {
        "a": [1, 255, 65535, 2**31 - 1, -5, 2**70, 1.5, None, True, False, "é", (), (1,), (1, 2)],
        "b": ((1, 2, 3), (1, 2, 3, 4), {}, {"c": []}, [[]]),
    }
    for protocol in (2, 3, 4, 5):
        assert read_value(io.BytesIO(pickle.dumps(value, protocol))) == value
    ordered = collections.OrderedDict(x={}, y=[])
    assert read_value(io.BytesIO(pickle.dumps(ordered, 2))) == ordered


def test_versions_of_modules_are_dropped_wherever_they_stand():
    found = collections.OrderedDict()
    found._metadata = collections.OrderedDict({"": {"version": 1}})
    assert read_tensors(io.BytesIO(pickle.dumps(found, 2))) == {}
    assert read_tensors(io.BytesIO(pickle.dumps({"_metadata": {"": {"version": 1}}}, 2))) == {}
    found.other = 1
    with pytest.raises(UnfitError, match="that sets attributes"):
        read_tensors(io.BytesIO(pickle.dumps(found, 2)))
