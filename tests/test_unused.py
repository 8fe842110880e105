"""Everything in the package is used by the package, not only by tests: names, and parameters.

Uses are found by name in the syntax trees, whatever they belong to; so what is reported is unused
for certain, and some of what is unused is not reported.
"""

import ast
from collections import defaultdict
from functools import cache

from tests.test_house import FILES, ROOT, syntax

# Called by others: pydantic, argparse, PyYAML, users of the library.
OUTSIDE = {
    "parse_known_args",
    "__getattr__",
    "__dir__",
    "compose_node",
    "compose_mapping_node",
    "construct_object",
}
PUBLIC = {
    *("fit", "load_config", "load_pretrained", "PretrainedModel", "PretrainedEncoder"),
    *("adapt", "with_adapters"),
    *("consistency_nlg", "diversity_nlg", "spectral_nlg"),
}
SOURCES = [*FILES, ROOT / "train.py"]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def definitions(path):
    """Every (name, node, number of ``self`` arguments) at the top of a file and of its classes."""
    for node in syntax(path).body:
        if isinstance(node, FUNCTION):
            yield node.name, node, 0
        elif isinstance(node, ast.ClassDef):
            yield node.name, node, 0
            for inner in node.body:
                static = isinstance(inner, FUNCTION) and any(
                    getattr(mark, "id", "") == "staticmethod" for mark in inner.decorator_list
                )
                # A decorator may call what it marks, as pydantic's validators do.
                marked = isinstance(inner, FUNCTION) and any(
                    isinstance(mark, ast.Call) for mark in inner.decorator_list
                )
                if isinstance(inner, FUNCTION) and not marked:
                    yield inner.name, inner, 0 if static else 1
        # What is registered is used by its name.
        elif (
            isinstance(node, ast.Assign)
            and last_word(getattr(node.value, "func", None)) != "register"
        ):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node, 0


def words(node):
    """Names that a piece of code reads: variables, attributes, and words in quotes."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            yield part.id
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


@cache
def counted():
    """How often each word stands in the package, and in each definition."""
    everywhere = defaultdict(int)
    for path in SOURCES:
        for word in words(syntax(path)):
            everywhere[word] += 1
    return everywhere


def test_every_definition_is_used_by_the_package():
    unused = []
    for path in SOURCES:
        for name, node, _ in definitions(path):
            known = name.startswith("__") or name in OUTSIDE | PUBLIC
            itself = sum(word == name for word in words(node))
            if not known and counted()[name] <= itself:
                unused.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not unused, "\n".join(unused)


@cache
def calls():
    """Every call by the last word of what it calls, ``partial`` among them."""
    found = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call):
                found[last_word(node.func)].append((node.args, node.keywords))
                if last_word(node.func) == "partial":
                    found[last_word(node.args[0])].append((node.args[1:], node.keywords))
    return found


def last_word(node):
    return getattr(node, "attr", getattr(node, "id", ""))


def gives(call, name, place):
    """Whether a call gives a parameter, by its name, by its place or by unpacking."""
    arguments, keywords = call
    if any(keyword.arg in (name, None) for keyword in keywords):
        return True
    starred = any(isinstance(argument, ast.Starred) for argument in arguments)
    return place is not None and (starred or len(arguments) > place)


def optional(function, skipped):
    """(name, place) of the parameters that have a default; no place for a keyword."""
    positional = [*function.args.posonlyargs, *function.args.args][skipped:]
    for place in range(len(positional) - len(function.args.defaults), len(positional)):
        yield positional[place].arg, place
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is not None:
            yield argument.arg, None


def test_every_optional_parameter_is_given_somewhere():
    never = []
    for path in SOURCES:
        public = {
            inner.name
            for node in syntax(path).body
            if isinstance(node, ast.ClassDef) and node.name in PUBLIC
            for inner in node.body
            if isinstance(inner, FUNCTION)
        }
        for name, node, skipped in definitions(path):
            # What `__call__` is given cannot be seen by name, nor what a function held in a table.
            if not isinstance(node, FUNCTION) or name == "__call__" or name in PUBLIC | public:
                continue
            called = calls()[name]
            for argument, place in optional(node, skipped):
                if called and not any(gives(c, argument, place) for c in called):
                    never.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}({argument})")
    assert not never, "\n".join(never)
