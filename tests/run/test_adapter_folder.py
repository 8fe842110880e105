"""What a run leaves in ``adapter/`` beside the adapter, whatever disturbed it, and its export."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoTokenizer

from balora_jax import finetune, load_config
from tests.io.hub_stand_in import served
from tests.run.conftest import invoke
from tests.tiny_run import EOS, FEW, tree_digest, write_config, write_rows

COPIED = ("tokenizer.json", "tokenizer_config.json")
NAMES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "balora_config.yaml",
    *COPIED,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
    + EOS
    + "{% endif %}{% endfor %}"
)


def test_everything_is_there(finished, inputs):
    folder = finished.workdir / "adapter"
    assert {path.name for path in folder.iterdir()} == NAMES
    for name in COPIED:
        assert (folder / name).read_bytes() == (inputs / "model" / name).read_bytes()
    assert load_config(folder / "balora_config.yaml") == load_config(finished.config)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(inputs / "model")
    assert config["revision"] is None


def test_the_card_says_what_the_run_was(finished, inputs):
    card = ModelCard.load(finished.workdir / "adapter" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "ba-lora"],
    }  # fmt: skip
    summary = json.loads((finished.workdir / "summary.json").read_text())
    before, after = (summary[when]["exact_match"] for when in ("before", "after"))
    lines = card.text.splitlines()
    assert f"- `exact_match`: {before:.4f} before, {after:.4f} after" in lines
    assert "- Trained on `train.jsonl`" in lines
    assert "- Scored on `validation.jsonl`" in lines
    assert any(line.startswith("- Of these: 24 examples of 24 rows (") for line in lines)
    assert "- `adapter.rank`: `2`" in lines
    assert "- `training.learning_rate`: `0.05`" in lines
    assert f"jax {summary['versions']['jax']}, " in card.text
    assert "4 optimizer steps, 0 updates skipped." in card.text
    assert "balora train balora_config.yaml --workdir runs/again" in lines
    assert str(inputs) not in card.content
    assert str(finished.workdir) not in card.content


def test_peft_and_transformers_open_the_folder_by_itself(finished):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    folder = finished.workdir / "adapter"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("20+3=", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 6)
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - plain).abs().max() > 1e-2


def test_the_chat_template_that_was_trained_with(tmp_path, inputs, no_curves, monkeypatch):
    (tmp_path / "chat.jinja").write_text(TEMPLATE + "\n")
    turns = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "#3"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    data = {
        "train": str(rows), "validation": None, "template": "chat", "messages_column": "messages",
        "chat_template": str(tmp_path / "chat.jinja"),
    }  # fmt: skip
    config = write_config(
        tmp_path / "c.yaml", inputs, adapter=FEW, data=data, training={"max_steps": 1}
    )
    # Gone before the end: what was read at the start is written.
    whole = finetune.export_trained

    def export(*given):
        (tmp_path / "chat.jinja").unlink()
        return whole(*given)

    monkeypatch.setattr(finetune, "export_trained", export)
    outcome = invoke("train", config, "--workdir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "run" / "adapter"
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert {path.name for path in folder.iterdir()} == {*NAMES, "chat_template.jinja"}


def test_a_chat_template_that_no_row_was_written_by_is_not_there(finished, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    config = load_config(finished.config)
    file = {"chat_template": str(tmp_path / "chat.jinja")}
    for more, wanted in (({}, None), ({"template": "chat"}, TEMPLATE)):
        named = config.model_copy(update={"data": config.data.model_copy(update=file | more)})
        assert finetune.chat_template_of(named) == wanted


@pytest.mark.parametrize("place", ["score", "write_card", "write_results"])
def test_a_run_that_ends_before_its_card_goes_on_to_the_same_bytes(
    finished, tmp_path, no_curves, monkeypatch, place
):
    """Stopped after the adapter is written: before the score, the card or the summary."""
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    (run / "summary.json").unlink()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        owner = finetune.Training if place == "score" else finetune
        patched.setattr(owner, place, stop)
        assert invoke("train", finished.config, "--workdir", run, "--resume").code == 3
    assert not (run / "summary.json").exists()
    card = (run / "adapter" / "README.md").read_text()
    assert (" after\n" in card) == (place == "write_results")
    # What a kill leaves of the card's draft.
    (run / ".README.md.abcd1234.partial").write_text("half")
    assert invoke("train", finished.config, "--workdir", run, "--resume").code == 0
    assert tree_digest(run / "adapter") == tree_digest(finished.workdir / "adapter")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["notes.md", "tokenizer.json"])
def test_what_is_a_users_own_stays(finished, tmp_path, name):
    """A file of another name, and a folder of a known one."""
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    (run / "adapter" / name).unlink(missing_ok=True)
    (run / "adapter" / name).mkdir()
    (run / "adapter" / name / "mine").write_text("mine")
    before = tree_digest(run)
    outcome = invoke("train", finished.config, "--workdir", run, "--resume")
    assert outcome.code == 2
    assert "got a folder with other files in it. Move them elsewhere." in outcome.err
    assert tree_digest(run) == before


def exported(finished, out, *more):
    return invoke("export", finished.config, "--workdir", finished.workdir, "--out", out, *more)


def test_an_export_has_all_of_it(finished, tmp_path):
    assert exported(finished, tmp_path / "same").code == 0
    assert tree_digest(tmp_path / "same") == tree_digest(finished.workdir / "adapter")
    assert exported(finished, tmp_path / "small", "--rank", "1").code == 0
    whole, small = tree_digest(tmp_path / "same"), tree_digest(tmp_path / "small")
    assert whole.keys() == small.keys()
    changed = {name for name in whole if whole[name] != small[name]}
    assert changed == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.startswith((tmp_path / "same" / "README.md").read_text())
    assert "its rank is at most 1." in card


def test_exports_of_other_kinds_have_cards_of_their_own(finished, tmp_path, capsys):
    pytest.importorskip("gguf")
    run = tmp_path / "run"
    shutil.copytree(finished.workdir / "adapter", run / "adapter")
    (run / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
    kinds = {
        "gguf": {"adapter.gguf", "README.md", "balora_config.yaml"},
        "merged": {"config.json", "model.safetensors", "chat_template.jinja", *NAMES}
        - {"adapter_config.json", "adapter_model.safetensors"},
    }
    for kind, names in kinds.items():
        export = ("export", finished.config, "--workdir", run, "--format", kind, "--out")
        (run / "adapter" / "README.md").write_bytes(
            (finished.workdir / "adapter" / "README.md").read_bytes()
        )
        assert invoke(*export, tmp_path / kind).code == 0
        assert {path.name for path in (tmp_path / kind).iterdir()} == names
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert card.data.library_name == {"gguf": "gguf", "merged": "transformers"}[kind]
        assert "4 optimizer steps, 0 updates skipped." in card.text
        (run / "adapter" / "README.md").write_text("# Mine\n")
        outcome = invoke(*export, tmp_path / f"{kind}-mine")
        assert "README.md: not as it was written by the run; no card of it." in outcome.err
        assert not (tmp_path / f"{kind}-mine" / "README.md").exists()
        assert (tmp_path / f"{kind}-mine" / "balora_config.yaml").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("named", ["org/base", "the folder of the cache"])
def test_the_base_is_named_as_on_the_hub(finished, inputs, tmp_path, monkeypatch, named):
    """Of a base in the hub's cache, by name or by place: its name and the commit."""
    repository = tmp_path / "hub" / "models--org--base"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(inputs / "model", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = named if named == "org/base" else snapshot
    out = tmp_path / "out"
    outcome = exported(finished, out, "--set", f"model.name_or_path={name}")
    assert outcome.code == 0, outcome.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == COMMIT


@pytest.fixture
def hub(monkeypatch):
    with served(monkeypatch) as hub:
        yield hub


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client
def test_an_export_that_is_pushed(finished, tmp_path, hub):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    push = ("--push-to-hub", "me/sums", "--private")
    outcome = exported(finished, out, *push, "--json", figures)
    assert outcome.code == 0, outcome.err
    assert json.loads(figures.read_text())["pushed"] == f"{hub.endpoint}/me/sums"
    assert hub.repositories["me/sums"]["private"]
    files = hub.repositories["me/sums"]["files"]
    assert files == {".gitattributes": b"", **{p.name: p.read_bytes() for p in out.iterdir()}}
    assert yaml.safe_load(files["balora_config.yaml"])["adapter"]["rank"] == 2


def test_a_push_that_is_refused(finished, tmp_path, hub, monkeypatch):
    out = tmp_path / "out"
    hub.refuse = 403
    outcome = exported(finished, out, "--push-to-hub", "them/sums")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "balora: --push-to-hub them/sums: expected a token that may write there, got a refusal "
        f"(403). Make one with write access. What is exported stays in {out}."
    )
    assert (out / "adapter_config.json").is_file()
    # Before anything is written: no token, no name, no push that would be private.
    asked = list(hub.asked)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for more in (("--push-to-hub", "me/sums"), ("--push-to-hub", "sums"), ("--private",)):
        outcome = exported(finished, tmp_path / "none", *more)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "none").exists()
    assert outcome.err == (
        "balora: --private: expected --push-to-hub with it, got none. Name a repository.\n"
    )
    assert hub.asked == asked
