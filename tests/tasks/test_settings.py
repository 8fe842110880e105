"""Each setting is read by a task or refused by it, by name."""

import pytest

from balora_jax import config as schema
from balora_jax import finetune
from balora_jax.config_file import dump_config, parse_config
from balora_jax.config_schema import run_schema
from balora_jax.errors import InputError
from balora_jax.finetune import fit
from balora_jax.tasks.settings import SETTINGS
from tests.tiny_labels_run import label_config_tree, write_label_inputs
from tests.tiny_run import config_tree, write_inputs

SECTIONS = {
    name: field.annotation
    for name, field in run_schema().model_fields.items()
    if hasattr(field.annotation, "model_fields")
}
KEYS = {f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields}
TREES = {
    "text": (write_inputs, config_tree),
    "labels": (write_label_inputs, label_config_tree),
}
OTHER = {
    "model.attention": "cudnn",
    "regularizers.top_k": 3,
    "regularizers.mask_alignment": "official",
    "regularizers.teacher_head": "probe",
    "regularizers.teacher_cache_folder": "teachers",
    "regularizers.teacher_fraction": 0.5,
    "data.template": "plain",
    "data.prompt_column": "q",
    "data.response_column": "a",
    "data.input_column": "i",
    "data.messages_column": "turns",
    "data.tools_column": "t",
    "data.assistant_turns": "last",
    "data.conversation": "turns",
    "data.chat_template": "chat.jinja",
    "data.chat_template_kwargs": {"enable_thinking": False},
    "data.today": "2026-01-31",
    "data.overlong": "drop",
    "data.bad_rows": "skip",
    "data.packing": True,
    "data.glue": "rte",
    "data.text_columns": ["text"],
    "data.label_column": "kind",
    "data.labels": ["bad", "good"],
    "data.regression": True,
    "training.head": "plain",
    "training.head_chunk": 8,
    "training.head_memory_mib": 8,
    "mesh.sequence": 2,
    "eval.marker": "#",
    "eval.max_new_tokens": 3,
    "eval.temperature": 0.5,
    "eval.top_p": 0.5,
    "eval.prompt_column": "q",
    "eval.gold_column": "a",
    "eval.grader": "plain",
    "eval.samples": 2,
    "eval.prompts": ["1+1"],
}
"""For each key that some task ignores, a value that is not the default."""


def tree_of(task, inputs, **overrides):
    return TREES[task][1](inputs, **overrides)


@pytest.mark.parametrize(
    ("task", "key"), [(task, key) for task, own in SETTINGS.items() for key in own.unread]
)
def test_what_a_task_does_not_read_is_refused(task, key, tmp_path):
    section, name = key.split(".")
    tree = tree_of(task, tmp_path)
    tree.setdefault(section, {})[name] = OTHER[key]
    who = "text does" if task == "text" else "labels do"
    with pytest.raises(InputError) as error:
        parse_config(tree, "config")
    said = str(error.value)
    assert said.startswith(f"config: {key}: expected ")
    assert said.endswith(f": {who} not read it. Leave it out.")
    assert f" with task {task}, got " in said


def test_the_sentence():
    tree = {"model": {"name_or_path": "x"}, "data": {"glue": "rte", "packing": True}}
    with pytest.raises(InputError) as error:
        parse_config({**tree, "task": "labels", "training": {"epochs": 1}}, "my.yaml")
    assert str(error.value) == (
        "my.yaml: data.packing: expected batch with task labels, got rows: labels do not read it. "
        "Leave it out."
    )


@pytest.mark.parametrize(
    ("given", "read"), [(True, "rows"), (False, "none"), ("batch", "batch"), ("none", "none")]
)
def test_packing_was_once_true_or_false(given, read, tmp_path):
    for task in TREES if read in ("none", "batch") else ["text"]:
        config = parse_config(tree_of(task, tmp_path, data={"packing": given}), "config")
        assert config.data.packing == read


@pytest.mark.parametrize("task", TREES)
def test_a_dumped_config_loads_again(task, tmp_path):
    import yaml

    config = parse_config(tree_of(task, tmp_path), "config")
    assert parse_config(yaml.safe_load(dump_config(config)), "dumped") == config


@pytest.mark.parametrize(("paper", "ours"), [("nlg", "text"), ("nlu", "labels")])
def test_the_papers_names_are_read_as_ours(paper, ours, tmp_path):
    tree = tree_of(ours, tmp_path)
    assert parse_config({**tree, "task": paper}, "config").task == ours


HANDED_ON = {"mesh.sequence", "regularizers.top_k", "regularizers.mask_alignment"}
"""Code that all tasks share reads these, and the labels' own does nothing with them."""


@pytest.mark.parametrize("task", TREES)
def test_every_setting_is_read_by_a_task_or_refused(task, tmp_path, monkeypatch):
    """One step with a config that remembers which of its values were asked for."""
    inputs = TREES[task][0](tmp_path)
    config = parse_config(
        tree_of(
            task,
            inputs,
            regularizers={
                "consistency_schedule": "adaptive",
                "diversity_schedule": "linear_warmup",
            },
            training={"max_steps": None, "epochs": 0.2, "checkpoint_every": 0},
            eval={"task": None, "limit": 2},
        ),
        "config",
    )
    seen = set()
    names = {kind: section for section, kind in SECTIONS.items()}

    def remembered(kinds):
        def get(self, name):
            section = kinds.get(type(self))
            if section is not None and f"{section}.{name}" in KEYS:
                seen.add(f"{section}.{name}")
            return object.__getattribute__(self, name)

        return get

    monkeypatch.setattr(schema.Section, "__getattribute__", remembered(names), raising=False)
    # The card writes down what was set, whoever reads it.
    monkeypatch.setattr(finetune, "model_card", lambda trained, kind: "card\n")
    # The terms get their section as a whole.
    given = config.regularizers.of_the_terms()
    seen |= {f"regularizers.{name}" for name in given}
    fit(config, workdir=tmp_path / "run")
    # Read by balora study alone, and by a run that goes on.
    of_all = {key for key in KEYS if key.startswith("study.")} | {"training.extend"}
    assert KEYS - of_all - seen == set(SETTINGS[task].unread) - HANDED_ON


@pytest.mark.parametrize("key", ["\x1b[2J", "str", "a[0]", "train as a list"])
def test_an_unknown_key_is_named_whatever_it_looks_like(key, tmp_path):
    tree = tree_of("text", tmp_path)
    tree["data"][key] = 1
    with pytest.raises(InputError, match="unknown key in data"):
        parse_config(tree, "config")
    with pytest.raises(InputError, match="unknown key in the top level"):
        parse_config({**tree_of("text", tmp_path), key: 1}, "config")
