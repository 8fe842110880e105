"""The card of an adapter as the hub reads it, and the name of its base."""

import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from balora_jax.config_file import parse_config
from balora_jax.pretrained.base_name import BaseName, base_name
from balora_jax.pretrained.card import Subject, Trained, card_anew, model_card
from balora_jax.pretrained.card_kinds import GGUF, MERGED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = BaseName("org/base", COMMIT, True)
HOSTILE = [
    "a`b``c", "`", "```", "a|b", "# heading", "<script>alert(1)<!--", "---", "\n---\n# x",
    "[a](javascript:b)", "*a* _b_", "  a  ", "'\"", "no", "~", "a: b # c", "{{x}}", "\\", "\u202eabc",
    "\x1b[31m", "ÄÖ漢字🙂",
]  # fmt: skip


def tree(**sections):
    given = {
        "model": {"name_or_path": "org/base"},
        "data": {"train": "org/sums:main", "validation": "/home/anna/secret/held_out.jsonl"},
        "training": {"max_steps": 3},
    }
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values if isinstance(values, dict) else values
    return given


def trained(base=HUB, **sections):
    config = parse_config(tree(**sections), "test")
    names = ("adapter", "regularizers", "training")
    return SimpleNamespace(
        base=base, task_type="CAUSAL_LM", outputs=None,
        sections={name: getattr(config, name) for name in names}, data=config.data,
        rows="7 examples of 9 rows", steps=3, skipped=1,
        before={"exact_match": 0.25, "rows": 4, "grader": "plain"},
        after={"exact_match": 0.5, "rows": 4, "grader": "plain"},
    )  # fmt: skip


def card(run):
    return model_card(Trained(**vars(run)))


def front(text):
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def spans(text):
    """Texts of the code spans of a card, by a reader of Markdown that is not ours."""
    reader = pytest.importorskip("markdown_it").MarkdownIt()
    body = ModelCard(text).text
    inline = [token for token in reader.parse(body) if token.type == "inline"]
    kinds = [child.type for token in inline for child in token.children]
    headings = [token.content for token in inline if token.content.startswith(("LoRA", "Data"))]
    assert len(headings) == 2
    return [c.content for t in inline for c in t.children if c.type == "code_inline"], kinds


def test_the_front_matter():
    text = card(trained())
    assert front(text) == {
        "base_model": "org/base",
        "datasets": ["org/sums"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "ba-lora"],
    }
    assert ModelCard(text).data.to_dict() == front(text)


def test_several_sets_and_files():
    """Hub sets by their names, once each; of files nothing, and in the body no folder."""
    sets = ["org/a:x", {"path": "org/a:y"}, "/home/anna/secret/rows.jsonl", "c4"]
    text = card(trained(data={"train": sets}))
    assert front(text)["datasets"] == ["org/a", "c4"]
    for name in ("`org/a:x`", "`org/a:y`", "`rows.jsonl`", "`c4`", "`held_out.jsonl`"):
        assert f"on {name}\n" in text
    assert "secret" not in text
    assert "anna" not in text


def test_a_base_in_a_folder_is_no_base_of_the_hub():
    text = card(trained(base=BaseName("/home/anna/my base", None, False)))
    assert "base_model" not in front(text)
    assert "for `my base`" in text
    assert "anna" not in text


def test_settings_that_differ_and_no_others():
    changed = {
        "adapter": {"rank": 4, "start": "/home/anna/adapters/first", "use_rslora": True},
        "regularizers": {"consistency": 0.7, "diversity": 0.0},
        "training": {"learning_rate": 1e-3, "log_every": 7, "stop_at": 2, "seed": 42},
    }
    found = dict(re.findall(r"^- `(\w+\.\w+)`: `(.*)`$", card(trained(**changed)), re.MULTILINE))
    # The seed is the default; how often is logged, and where a session ends, change nothing.
    assert found == {
        "adapter.rank": "4",
        "adapter.start": '"first"',
        "adapter.use_rslora": "true",
        "regularizers.consistency": "0.7",
        "regularizers.diversity": "0.0",
        "training.max_steps": "3",
        "training.learning_rate": "0.001",
    }


def test_scores_before_and_after():
    run = trained()
    lines = card(run).splitlines()
    assert "- `exact_match`: 0.2500 before, 0.5000 after" in lines
    assert "- `rows`: 4" in lines
    assert "- `grader`: `plain`" in lines
    run.after = {}
    assert "- `exact_match`: 0.2500 before" in card(run).splitlines()
    run.before = {}
    assert "## Scores" not in card(run)
    assert "3 optimizer steps, 1 updates skipped." in card(run)


def test_no_terms_no_ba_lora():
    text = card(trained(regularizers={"consistency": 0, "diversity": 0, "spectral": 0}))
    assert front(text)["tags"] == ["lora"]
    assert "BA-LoRA" not in text


def test_an_encoder():
    run = trained()
    run.task_type, run.outputs = "SEQ_CLS", 3
    text = card(run)
    assert front(text)["pipeline_tag"] == "text-classification"
    assert (
        f'AutoModelForSequenceClassification.from_pretrained("org/base", revision="{COMMIT}", '
        "num_labels=3)" in text
    )


def test_glue_by_its_name_on_the_hub():
    text = card(trained(task="labels", data={"train": None, "glue": "mrpc"}))
    assert front(text)["datasets"] == ["nyu-mll/glue"]
    assert "- Trained on `nyu-mll/glue:mrpc`" in text


@pytest.mark.parametrize("word", HOSTILE)
def test_values_stay_what_they_are(word):
    """As a name of a file, of a base, and of a layer: one code span, on one line, nothing else."""
    base = BaseName(f"/m/{word}".replace("\0", ""), None, False)
    run = trained(base, adapter={"target_modules": [word]}, data={"train": f"./{word}.jsonl"})
    text = card(run)
    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    found, kinds = spans(text)
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{word}.jsonl")
    assert shown.strip() in [one.strip() for one in found]
    assert set(kinds) == {"text", "code_inline", "link_open", "link_close"}
    assert kinds.count("link_open") == 1  # to the settings


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("kind", [GGUF, MERGED])
def test_the_card_of_an_export_says_of_the_run_what_the_adapters_does(kind, word):
    run = trained(adapter={"target_modules": [word]}, data={"train": f"./{word}.jsonl"})
    whole, about = Trained(**vars(run)), ("base", "task_type", "outputs", "sections", "data")
    subject = Subject(**{name: getattr(run, name) for name in about})
    text = card_anew(model_card(whole), subject, kind)
    middle = model_card(whole).split("\n## Data\n")[1].split("\n## Use\n")[0]
    assert middle in text
    after = text.split(middle)[1]
    name = {GGUF: "gguf", MERGED: "merged"}[kind]
    command = (
        f"balora export balora_config.yaml --workdir runs/again --format {name} --out {name}\n"
    )
    assert command in after
    assert "PeftModel" not in after
    assert front(text) | {"library_name": "peft"} == front(model_card(whole))
    assert front(text)["library_name"] == {GGUF: "gguf", MERGED: "transformers"}[kind]
    assert f"`org/base` at revision `{COMMIT}`" in text.split(middle)[0]
    assert card_anew("# Mine\n", subject, kind) is None


def test_no_name_is_taken_for_a_place_in_the_example():
    base = BaseName("org/MODEL", "REMARK-BASE", True)
    text = card(trained(base=base))
    assert '.from_pretrained("org/MODEL", revision="REMARK-BASE")\n' in text


def test_the_name_of_a_base(tmp_path):
    plain = tmp_path / "base"
    cache = tmp_path / "hub" / "models--org--my-base" / "snapshots" / COMMIT
    bare = tmp_path / "hub" / "models--gpt2" / "snapshots" / COMMIT
    link = tmp_path / "link"
    for folder in (plain, cache, bare):
        folder.mkdir(parents=True)
    link.symlink_to(cache)
    expected = {
        # Where it lies, how the config names it, its revision there.
        (plain, str(plain), None): (str(plain), None, False),
        (plain, "balora_jax:quickstart/model", None): (str(plain), None, False),
        (cache, "org/my-base", None): ("org/my-base", COMMIT, True),
        (cache, "org/my-base", "v2"): ("org/my-base", "v2", True),
        (cache, str(cache), None): ("org/my-base", COMMIT, True),
        (link, str(link), None): ("org/my-base", COMMIT, True),
        (bare, str(bare), None): ("gpt2", COMMIT, True),
        (plain, "gpt2", None): ("gpt2", None, True),
    }
    for given, wanted in expected.items():
        assert tuple(base_name(*given)) == wanted, given
