"""Work in parts, by processes that are threads here: whole in each of them, or an error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from balora_jax.data.examples import ExampleSettings, encode_rows
from balora_jax.errors import InputError, RunStoppedError
from balora_jax.parallel import hosts
from tests.data import tiny_tokenizer as tiny

PROCESSES = 3


@pytest.fixture
def everywhere(monkeypatch):
    """Calls a function in each of the processes; what they returned or raised."""
    barrier, me = threading.Barrier(PROCESSES, timeout=60), threading.local()
    table = [None] * PROCESSES

    def process_allgather(value):
        table[me.index] = np.asarray(value)
        barrier.wait()
        assert len({(one.shape, one.dtype) for one in table}) == 1
        found = np.stack(table)
        barrier.wait()
        return found

    monkeypatch.setattr(jax, "process_count", lambda: PROCESSES)
    monkeypatch.setattr(jax, "process_index", lambda: me.index)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", process_allgather)

    def call(action):
        def run(index):
            me.index = index
            try:
                return action()
            except (InputError, RunStoppedError) as error:
                return error

        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(run, range(PROCESSES)))

    return call


@pytest.mark.parametrize("piece", [1, 4, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
def test_parts_are_joined_in_order(everywhere, monkeypatch, count, piece):
    monkeypatch.setattr(hosts, "_PIECE", piece)
    done = []

    def work(start, stop):
        done.extend(range(start, stop))
        # Item i leaves i numbers: parts of very different sizes, the first perhaps of none.
        return np.repeat(np.arange(start, stop), range(start, stop)).astype(np.int32)

    expected = np.repeat(np.arange(count), range(count))
    for found in everywhere(lambda: hosts.share_out(count, work)):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    assert sorted(done) == list(range(count))  # each item once, whoever did it


def test_an_error_ends_all(everywhere):
    def work(start, stop):
        if start <= 4 < stop:
            raise InputError("row 5: bad.")
        return np.zeros(2, np.int32)

    first, second, third = everywhere(lambda: hosts.share_out(9, work))
    assert (type(second), str(second)) == (InputError, "row 5: bad.")
    for other in (first, third):
        assert isinstance(other, RunStoppedError)
        assert "process 1 of 3 could not start" in str(other)


def plain(i):
    return {"q": "ab " * (i % 13 + 1), "a": f"c{i} d"}


def conversation(i):
    said = ["one", f"two {i}", "three " * (i % 13 + 1), "four"]
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]}


@pytest.mark.parametrize(
    ("row", "settings", "tokenizer"),
    [
        (plain, ExampleSettings("plain", "q", "a", max_length=24), {}),
        (
            conversation,
            ExampleSettings("chat", messages_column="messages", max_length=75),
            {"eos": tiny.END, "chat": tiny.CHAT},
        ),
    ],
)
def test_rows_are_tokenised_by_all_to_the_examples_of_one(everywhere, row, settings, tokenizer):
    rows = [row(i) for i in range(20)]

    def encode(share_out=hosts.share_out):
        return encode_rows(rows, tiny.make(**tokenizer), settings, share_out=share_out)

    alone = encode(lambda count, work: work(0, count))
    assert 0 < alone.report.truncated < alone.report.kept
    for found in everywhere(encode):
        assert found.report == alone.report
        for one, other in zip(found.examples, alone.examples, strict=True):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    rows[8] = {"something": "else"}
    errors = everywhere(encode)
    assert [type(error) for error in errors] == [RunStoppedError, InputError, RunStoppedError]
    assert "row 9" in str(errors[1])
