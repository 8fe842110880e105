"""A user's way: own conversations, looked at, trained, stopped, gone on with, asked and taken away."""

import io
import json
import sys

import numpy as np
import pytest

from balora_jax import load_pretrained
from tests.run.conftest import invoke
from tests.run.test_chat import TEMPLATE
from tests.tiny_run import (
    FEW,
    adapter_bytes,
    metrics_of,
    sums,
    write_config,
    write_inputs,
    write_rows,
)

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.array([[1, 4, 13, 5, 14, 6]])
WATCHED = {
    "every": 2, "score_every": 4, "samples": 2, "limit": 3, "task": "exact_match", "max_new_tokens": 4,
}  # fmt: skip


def said(*arguments, code=0):
    outcome = invoke(*arguments)
    assert outcome.code == code, outcome.err
    return outcome


def of_torch(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def close(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.ptp(theirs)


@pytest.fixture
def config(tmp_path):
    """Conversations of one to two turns, and a run that is measured on the way."""
    inputs = write_inputs(tmp_path)
    (inputs / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name, count, seed in (("train", 24, 1), ("validation", 6, 2)):
        rows = []
        for i, row in enumerate(sums(count, seed)):
            turn = [{"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]}]  # fmt: skip
            rows.append({"messages": turn * (1 + i % 2)})
        write_rows(inputs / f"{name}.jsonl", rows)
    data = {"template": "chat", "messages_column": "messages", "max_length": 32}
    training = {"max_steps": 6, "checkpoint_every": 2, "keep_best": "validation_loss"}
    return write_config(
        tmp_path / "mine.yaml",
        inputs,
        adapter=FEW,
        regularizers={"spectral": 0.0},
        data=data,
        training=training,
        eval=WATCHED,
    )


def test_from_own_conversations_to_other_tools(config, tmp_path, monkeypatch):
    looked = said("check", config, "--no-memory").out
    assert "data: 24 examples of 24 rows" in looked
    run, whole = tmp_path / "run", tmp_path / "whole"
    said("train", config, "--workdir", whole)
    said("train", config, "--workdir", run, "--set", "training.stop_at=3")
    said("train", config, "--workdir", run, "--resume")
    assert metrics_of(run) == metrics_of(whole)
    assert adapter_bytes(run) == adapter_bytes(whole)

    losses = {
        row["step"]: row["validation_loss"] for row in metrics_of(run) if "validation_loss" in row
    }
    assert sorted(losses) == [0, 2, 4, 6]
    best = json.loads((run / "summary.json").read_text())["validation"]["best"]
    measured = {step: loss for step, loss in losses.items() if step}
    assert best["step"] == min(measured, key=measured.__getitem__)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 0, 3, 3, 4, 4, 6, 6]  # 3: the stop

    question = sums(1, 2)[0]["question"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
    asked = said("chat", config, "--adapter", run / "adapter")
    assert asked.out.rstrip("\n") == next(
        row["answer"] for row in samples if row["step"] == 6 and row["prompt"].endswith(question)
    )

    base = load_pretrained(str(tmp_path / "model"))
    for name in ("best", "adapter"):
        ours = load_pretrained(str(tmp_path / "model"), adapter=str(run / name))(IDS)
        close(ours, of_torch(peft.AutoPeftModelForCausalLM.from_pretrained(run / name)))
        assert np.abs(np.asarray(ours) - np.asarray(base(IDS))).max() > 1e-2
    said("export", config, "--workdir", run, "--format", "merged", "--out", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(
        load_pretrained(str(tmp_path / "model"), adapter=str(run / "adapter"))(IDS),
        of_torch(merged),
    )
