import pytest
from tiny_llama import make_llama


@pytest.fixture(scope="session")
def llama():
    return make_llama()


@pytest.fixture(scope="session")
def llama_folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder
