"""The text of the quickstart's model, and the task that it is fine-tuned for.

A small closed world in plain English: people who own, find, buy, give and lose things, sums stated
in words, a few fixed facts, and a school. ``documents`` writes the pretraining text; ``task_rows``
writes word problems of the same world in instruction form, answered in the style of GSM8K
("... The answer is: 7"), a form which the pretraining text never uses.

Everything follows from one seed. Only ``random.Random.random`` is drawn from, the one method whose
sequence Python promises to keep from version to version.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

MAX_NUMBER = 60
TRAIN_ROWS = 1200
VALIDATION_ROWS = 120
TASK_SEED = 2024

NAMES = (
    *("Ann", "Ben", "Tom", "Mia", "Leo", "Eva", "Sam", "Zoe"),
    *("Max", "Lily", "Jack", "Rosa", "Nina", "Paul", "Omar", "Kim"),
)
THINGS = (
    *("apples", "pears", "plums", "nuts", "eggs", "cakes", "cups", "books"),
    *("pens", "cards", "coins", "shells", "stones", "balls", "keys", "stamps"),
)
TOWNS = ("Oakham", "Milton", "Redford", "Ashby", "Corby", "Linton", "Weston", "Harlow")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
PETS = ("dog", "cat", "cow", "duck", "horse", "hen", "goat", "frog")
SOUNDS = ("barks", "purrs", "moos", "quacks", "neighs", "clucks", "bleats", "croaks")

# {a} owns the things, {b} is someone else, {n} how many, {t} which.
GAINS = (
    "{b} gives {a} {n} {t}.",
    "{a} finds {n} {t}.",
    "{a} buys {n} {t}.",
    "{a} gets {n} more {t}.",
)
LOSSES = (
    "{a} gives {b} {n} {t}.",
    "{a} loses {n} {t}.",
    "{a} sells {n} {t}.",
    "{b} takes {n} {t} from {a}.",
)
QUESTIONS = (
    "How many {t} does {a} have now?",
    "How many {t} are left with {a} in the end?",
    "Find the number of {t} that {a} has now.",
)
SCHOOL = (
    "{a} is at school in {town}.",
    "The teacher describes a task.",
    "The task is below.",
    "The teacher writes an instruction: count the {t}.",
    "{a} completes the task.",
    "{a} writes a response to {b}.",
    "The response is short.",
    "{a} asks {b} a question.",
    "{b} knows the answer.",
    "The answer of {a} is good.",
    "The teacher likes the answer.",
    "This is a request that {b} completes appropriately.",
    "{a} reads a book: it is {color}.",
)

_T = TypeVar("_T")


def below(rng: random.Random, stop: int) -> int:
    """Draw an integer of ``0 <= i < stop``."""
    return int(rng.random() * stop)


def pick(rng: random.Random, items: Sequence[_T]) -> _T:
    """Draw one item."""
    return items[below(rng, len(items))]


def pick_two(rng: random.Random, items: Sequence[_T]) -> tuple[_T, _T]:
    """Draw two different items."""
    first = below(rng, len(items))
    second = (first + 1 + below(rng, len(items) - 1)) % len(items)
    return items[first], items[second]


@dataclass(frozen=True)
class Problem:
    """Somebody's things and what becomes of them; ``changes`` are signed amounts.

    >>> p = Problem("Ann", "Ben", "cups", 9, (-4,), ("Ann loses 4 cups.",), None)
    >>> p.working()
    '9 minus 4 equals 5.'
    """

    owner: str
    other: str
    things: str
    start: int
    changes: tuple[int, ...]
    events: tuple[str, ...]
    aside: str | None

    @property
    def answer(self) -> int:
        """How many things the owner has in the end."""
        return self.start + sum(self.changes)

    def told(self) -> str:
        """The situation and what happens, without the result."""
        aside = () if self.aside is None else (self.aside,)
        return " ".join((f"{self.owner} has {self.start} {self.things}.", *aside, *self.events))

    def working(self) -> str:
        """The sums, one sentence for each change."""
        total, sums = self.start, []
        for change in self.changes:
            sums.append(statement(total, change))
            total += change
        return " ".join(sums)


def statement(number: int, change: int) -> str:
    """State one sum in words.

    >>> statement(12, 5)
    '12 plus 5 equals 17.'
    """
    sign = "plus" if change >= 0 else "minus"
    return f"{number} {sign} {abs(change)} equals {number + change}."


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem of one or two changes, often with a remark that does not matter."""
    owner, other = pick_two(rng, NAMES)
    things, other_things = pick_two(rng, THINGS)
    start = total = 2 + below(rng, MAX_NUMBER // 2 - 1)
    changes, events = [], []
    for _ in range(1 + below(rng, 2)):
        gain = total < 4 or (rng.random() < 0.5 and total + 2 <= MAX_NUMBER)
        room = MAX_NUMBER - total if gain else total - 2
        amount = 2 + below(rng, min(room, MAX_NUMBER // 2) - 1)
        changes.append(amount if gain else -amount)
        total += changes[-1]
        event = pick(rng, GAINS if gain else LOSSES)
        events.append(event.format(a=owner, b=other, n=amount, t=things))
    number = 2 + below(rng, MAX_NUMBER // 2 - 1)
    asides = (None, f"{other} has {number} {things}.", f"{owner} has {number} {other_things}.")
    return Problem(owner, other, things, start, tuple(changes), tuple(events), pick(rng, asides))


def _story(rng: random.Random) -> str:
    problem = draw_problem(rng)
    result = f"Now {problem.owner} has {problem.answer} {problem.things}."
    return f"{problem.told()} {problem.working()} {result}"


def _talk(rng: random.Random) -> str:
    problem = draw_problem(rng)
    question = pick(rng, QUESTIONS).format(t=problem.things, a=problem.owner)
    asker = pick(rng, NAMES)
    reply = f"{problem.working()} {problem.owner} has {problem.answer} {problem.things}."
    return f"{problem.told()} {asker} asks: {question}\n{problem.other} says: {reply}"


def _sums(rng: random.Random) -> str:
    sums = []
    for _ in range(3 + below(rng, 4)):
        total = below(rng, MAX_NUMBER + 1)
        part = below(rng, total + 1)
        sums.append(
            statement(part, total - part) if rng.random() < 0.5 else statement(total, -part)
        )
    return " ".join(sums)


def _order(rng: random.Random) -> str:
    low = below(rng, MAX_NUMBER - 6)
    count = "Count: " + ", ".join(str(low + i) for i in range(3 + below(rng, 4))) + "."
    high = low + 1 + below(rng, MAX_NUMBER - low)
    return f"{count} {high} is more than {low}. {low} is less than {high}."


def facts() -> tuple[str, ...]:
    """Everything that is always true in this world."""
    lines = []
    for i, name in enumerate(NAMES):
        pet = (i * 3 + 1) % len(PETS)
        lines += [
            f"{name} lives in {TOWNS[(i * 5 + i // 8) % len(TOWNS)]}.",
            f"{name} has a {PETS[pet]} that {SOUNDS[pet]}.",
            f"{name} likes the color {COLORS[(i * 7 + i // 8) % len(COLORS)]}.",
        ]
    for i, thing in enumerate(THINGS):
        lines.append(f"The {thing} are {COLORS[(i * 5 + i // 8) % len(COLORS)]}.")
    for pet, sound in zip(PETS, SOUNDS, strict=True):
        lines.append(f"A {pet} {sound}.")
    return tuple(lines)


FACTS = facts()


def _knowledge(rng: random.Random) -> str:
    return " ".join(pick(rng, FACTS) for _ in range(3 + below(rng, 3)))


def _school(rng: random.Random) -> str:
    a, b = pick_two(rng, NAMES)
    slots = {"a": a, "b": b, "t": pick(rng, THINGS), "color": pick(rng, COLORS)}
    town = TOWNS[(NAMES.index(a) * 5 + NAMES.index(a) // 8) % len(TOWNS)]
    return " ".join(pick(rng, SCHOOL).format(town=town, **slots) for _ in range(3 + below(rng, 3)))


def documents(seed: int) -> Iterator[str]:
    """Yield the pretraining text without end, one short document at a time."""
    rng = random.Random(seed)
    kinds = (_story, _story, _story, _talk, _talk, _sums, _sums, _order, _knowledge, _school)
    while True:
        yield pick(rng, kinds)(rng)


def is_held_out(problem: Problem) -> bool:
    """Whether a problem's first sum is kept out of the training rows, whatever its words."""
    return (3 * problem.start + 7 * problem.changes[0]) % 5 == 0


def task_row(rng: random.Random, problem: Problem) -> dict[str, str]:
    """Put a problem into instruction form."""
    question = pick(rng, QUESTIONS).format(t=problem.things, a=problem.owner)
    return {
        "instruction": f"{problem.told()} {question}",
        "output": f"{problem.working()} The answer is: {problem.answer}",
    }


def task_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Write the task set.

    Returns:
      Training rows and held-out rows. No instruction occurs twice, and no held-out row begins with
      a sum that begins a training row.
    """
    rng = random.Random(TASK_SEED)
    train: dict[str, dict[str, str]] = {}
    held_out: dict[str, dict[str, str]] = {}
    while len(train) < TRAIN_ROWS or len(held_out) < VALIDATION_ROWS:
        problem = draw_problem(rng)
        row = task_row(rng, problem)
        if is_held_out(problem):
            rows, wanted = held_out, VALIDATION_ROWS
        else:
            rows, wanted = train, TRAIN_ROWS
        if len(rows) < wanted:
            rows[row["instruction"]] = row
    return list(train.values()), list(held_out.values())


def write_task(folder: Path) -> None:
    """Write ``train.jsonl`` and ``validation.jsonl`` into a folder."""
    for name, rows in zip(("train", "validation"), task_rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
