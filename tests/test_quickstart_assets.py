"""The shipped quickstart: files, task rows, tokenizer and checkpoint are what they claim to be."""

import json
import random
import re
from pathlib import Path

import pytest

from balora_jax.quickstart import generate

FOLDER = Path(generate.__file__).parent
MODEL = FOLDER / "model"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read_rows(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def train():
    return read_rows("train.jsonl")


@pytest.fixture(scope="module")
def held_out():
    return read_rows("validation.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def continue_texts(model, tokenizer, texts, tokens):
    """Greedy continuations by transformers, left padded."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
    )
    new = out[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


@pytest.mark.parametrize(
    "path", ["train.jsonl", "validation.jsonl", *(f"model/{name}" for name in MODEL_FILES)]
)
def test_every_file_ships_and_stays_small(path):
    assert 0 < (FOLDER / path).stat().st_size < 2 * 2**20


def test_rows_have_the_two_columns_and_no_instruction_twice(train, held_out):
    rows = train + held_out
    assert all(set(row) == {"instruction", "output"} for row in rows)
    assert len({row["instruction"] for row in rows}) == len(rows)
    assert len(train) >= 1000
    assert len(held_out) >= 100


def test_no_held_out_row_begins_with_a_sum_of_a_training_row(train, held_out):
    def first_sums(rows):
        return {row["output"].split(" equals")[0] for row in rows}

    assert not first_sums(train) & first_sums(held_out)


def test_generator_writes_exactly_the_shipped_rows(tmp_path):
    generate.write_task(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_generator_follows_its_seed():
    def first(seed):
        texts = generate.documents(seed)
        return [next(texts) for _ in range(50)]

    assert first(3) == first(3)
    assert first(3) != first(4)


QUESTION = re.compile(
    r"How many (?P<t>\w+) does (?P<a>\w+) have now\?"
    r"|How many (?P<t2>\w+) are left with (?P<a2>\w+) in the end\?"
    r"|Find the number of (?P<t3>\w+) that (?P<a3>\w+) has now\."
)


def solve(instruction):
    """Work a problem out from its words alone: running totals of the one who is asked about."""
    asked = QUESTION.search(instruction)
    things = asked["t"] or asked["t2"] or asked["t3"]
    owner = asked["a"] or asked["a2"] or asked["a3"]
    total = None
    for sentence in instruction[: asked.start()].split(". "):
        words = sentence.strip(" .").split()
        if not words or things not in words:
            continue
        number = next(int(word) for word in words if word.isdigit())
        subject, verb = words[:2]
        if verb == "has":
            if subject == owner:
                total = number
        elif (verb == "gives" and words[2] == owner) or (
            subject == owner and verb in ("finds", "buys", "gets")
        ):
            total += number
        else:
            gave = subject == owner and verb in ("gives", "loses", "sells")
            assert gave or (verb == "takes" and words[-1] == owner), sentence
            total -= number
    return total


def test_every_answer_is_right(train, held_out):
    for row in train + held_out:
        answer = int(row["output"].rsplit("The answer is: ", 1)[1])
        assert solve(row["instruction"]) == answer, row
        for left, sign, right, result in re.findall(
            r"(\d+) (plus|minus) (\d+) equals (\d+)\.", row["output"]
        ):
            expected = int(left) + int(right) if sign == "plus" else int(left) - int(right)
            assert int(result) == expected, row
        assert row["output"].count(" equals ") in (1, 2)


def test_pretraining_text_never_uses_the_form_of_the_answers():
    texts = generate.documents(11)
    assert not any("The answer is:" in next(texts) for _ in range(5000))


@pytest.mark.parametrize(
    "text",
    [
        "Ann has 12 apples.\nBen says: 7.",
        "Grüße, 東京! \t 1,234.5 — naïve 🙂",
        "  two spaces  and trailing ",
        "0123456789",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_has_digits_and_special_tokens_of_their_own(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("4096")["input_ids"])[1:] == list("4096")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3
    assert tokenizer.decode([*tokenizer("a")["input_ids"], *special], skip_special_tokens=True) == (
        "a"
    )


def test_model_and_tokenizer_agree(model, tokenizer):
    config = model.config
    assert config.model_type == "llama"
    assert len(tokenizer) <= config.vocab_size
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads


def test_checkpoint_can_add_and_subtract_in_words(model, tokenizer):
    rng = random.Random(0)
    prompts, answers = [], []
    for _ in range(60):
        total = rng.randint(4, generate.MAX_NUMBER)
        part = rng.randint(2, total - 2)
        prompts.append(f"{part} plus {total - part} equals")
        answers.append(total)
        prompts.append(f"{total} minus {part} equals")
        answers.append(total - part)
    texts = continue_texts(model, tokenizer, prompts, 4)
    right = [re.match(rf" {a}\.", text) is not None for a, text in zip(answers, texts, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_checkpoint_knows_its_world_and_ends_its_documents(model, tokenizer):
    told = "Ann has 12 apples. Ben gives Ann 4 apples. 12 plus 4 equals 16. Now Ann has"
    prompts = ["Ann lives in", "A dog", told]
    facts = [fact for fact in generate.FACTS if fact.startswith(tuple(prompts[:2]))]
    texts = continue_texts(model, tokenizer, prompts, 6)
    for fact, prompt, text in zip(facts, prompts, texts, strict=False):
        assert (prompt + text).startswith(fact)
    assert texts[2].startswith(" 16 apples.")


def test_checkpoint_has_not_learnt_the_task(model, tokenizer, held_out):
    prompts = [f"{row['instruction']}\n" for row in held_out[:16]]
    assert not any("The answer is:" in t for t in continue_texts(model, tokenizer, prompts, 24))
