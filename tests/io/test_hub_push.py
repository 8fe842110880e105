"""A folder sent to a stand-in of the hub: what arrives, and every refusal in its words."""

import socket

import pytest
from huggingface_hub import constants

from balora_jax.errors import InputError
from balora_jax.io.hub_push import check_push, push
from tests.io.hub_stand_in import served

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40}
NAME = "me/sums"
# Of the client, when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    with served(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name, content in {**FILES, "README.md": b"---\nlibrary_name: peft\n---\n# A\n"}.items():
        (folder / name).write_bytes(content)
    (tmp_path / "secret.txt").write_text("not exported")
    return folder


def sent(folder, **options):
    return push(folder, NAME, marker="adapter_config.json", private=False, **options)


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        push(folder, NAME, **{"marker": "adapter_config.json", "private": False} | options)
    text = str(caught.value)
    assert text.startswith(f"--push-to-hub {NAME}: ")
    assert text.endswith(f" What is exported stays in {folder}.")
    return text.removeprefix(f"--push-to-hub {NAME}: ").partition(" What is exported")[0]


def test_what_arrives_is_the_folder_and_nothing_else(hub, folder):
    assert sent(folder) == f"{hub.endpoint}/{NAME}"
    found = hub.repositories[NAME]
    assert not found["private"]
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found["files"] == {".gitattributes": b"", **there}
    assert list(hub.repositories) == [NAME]
    assert [*hub.stored.values()] == [FILES["adapter_model.safetensors"]]
    # Once more: the repository is there, and holds an adapter.
    (folder / "adapter_config.json").write_bytes(b'{"r": 1}')
    sent(folder)
    assert found["files"]["adapter_config.json"] == b'{"r": 1}'


def test_a_private_one(hub, folder):
    push(folder, NAME, marker="adapter_config.json", private=True)
    assert hub.repositories[NAME]["private"]


def test_what_is_private_does_not_go_to_a_public_one(hub, folder):
    hub.repositories[NAME] = {"private": False, "files": {}}
    assert refusal(folder, private=True) == (
        "expected a private repository, got a public one that is there already. Make it private "
        "on the hub, or choose another name."
    )
    assert hub.repositories[NAME]["files"] == {}


def test_a_repository_of_another_kind_stays(hub, folder):
    files = {"config.json": b"{}", "model.safetensors": b"x"}
    hub.repositories[NAME] = {"private": False, "files": dict(files)}
    assert refusal(folder) == (
        "expected a new repository or one with adapter_config.json, got one with 'config.json'. "
        "Choose another name."
    )
    assert hub.repositories[NAME]["files"] == files
    sent_as_model = {"marker": "config.json"}
    push(folder, NAME, private=False, **sent_as_model)  # a merged export would go there


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            401,
            "expected a token that the hub takes, got a refusal (401). Log in again: hf auth login.",
        ),
        (
            403,
            "expected a token that may write there, got a refusal (403). "
            "Make one with write access.",
        ),
        (
            404,
            "expected an owner that is there, got none (404). Check the name, and whose token it is.",
        ),
    ],
)
def test_refused(hub, folder, status, words):
    hub.refuse = status
    assert refusal(folder) == words
    assert hub.repositories == {}


def test_a_wrong_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(folder).startswith("expected a token that the hub takes, got a refusal (401)")


def test_refused_in_the_middle(hub, folder):
    """The client wraps what happens to a large file; nothing is committed then."""
    hub.refuse, hub.refused = 403, "/stored/"
    assert refusal(folder).startswith("expected a token that may write there, got a refusal (403)")
    assert hub.repositories[NAME]["files"] == {".gitattributes": b""}


def test_something_else(hub, folder):
    hub.refuse = 418
    words = refusal(folder)
    assert words.startswith("expected the hub to take it, got: ")
    assert "418" in words
    assert words.endswith(". Correct that.")


def test_no_network(hub, folder, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    words = refusal(folder)
    assert words.startswith("expected a hub that can be reached, got: ")
    assert words.endswith(". Check the network.")


def test_no_token(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InputError) as caught:
        check_push(NAME)
    assert str(caught.value) == (
        f"--push-to-hub {NAME}: expected a token of the hub, got none. Log in with "
        "`hf auth login`, or set HF_TOKEN."
    )
    (tmp_path / "token").write_text("hf_stored\n")
    check_push(NAME)


@pytest.mark.parametrize(
    "name", ["", "me/", "a/b/c", "me/my sums", "me/-x", "../x", "me/x--y", "me/x\n"]
)
def test_no_name_of_a_repository(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(InputError, match=r"expected OWNER/NAME, got another form\. Correct it\."):
        check_push(name)


def test_no_owner(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(InputError, match=r"^--push-to-hub sums: expected OWNER/NAME, got no owner"):
        check_push("sums")
