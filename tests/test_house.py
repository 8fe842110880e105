"""The repository's own rules: layers, imports, sizes, settings and top-level names."""

import ast
import inspect
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import balora_jax
from balora_jax.config import OF_THE_TEACHER
from balora_jax.config_schema import run_schema
from balora_jax.io.checkpoint import FREE_KEYS
from balora_jax.numerics.objective import objective_of
from balora_jax.parallel.axes import AXES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "balora_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

# The layers, lowest first: a module imports what stands on its own line or above it. The longest
# name that a module's own begins with decides.
LAYERS = (
    ("errors",),
    ("untyped",),
    ("paths",),
    ("array_types", "registry", "extensions", "hardware", "options", "progress", "torch_import"),
    ("parallel.child", "parallel.launch", "parallel.patience"),
    ("signals",),
    ("parallel.supervise",),
    ("parallel.hosts",),
    ("numerics",),
    ("parallel.axes",),
    ("parallel.token_split",),
    ("models",),
    ("adapters", "generation", "heads", "regularizers"),  # doors to the two above
    ("evals",),
    ("config_types",),
    ("config_data",),
    ("config",),
    ("config_schema",),
    ("tasks.settings", "tasks.text.settings", "tasks.labels.settings"),
    ("config_file",),
    ("parallel",),
    ("io",),
    ("data",),
    ("pretrained",),
    ("training",),
    ("tasks",),
    ("finetune",),
    ("plan",),
    ("preview",),
    ("bench",),
    ("figures",),
    ("study",),
    ("quickstart",),
    ("",),  # the package's own __init__
    ("verbs",),
    ("cli",),
    ("__main__",),
)
ALONE = ("bench.torch_reference",)  # a program of its own: imports nothing of the package

# What arrays-in, arrays-out code needs; none of these opens a file or a socket.
PURE = {
    *("collections", "dataclasses", "difflib", "enum", "functools", "itertools", "math", "re"),
    *("importlib", "pkgutil"),  # a registry's folder imports its files
    *("typing", "zlib", "jax", "jaxtyping", "flax", "numpy", "qwix"),
}
READS_OR_WRITES = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "safe_open"}
MAY_OPEN = (
    "untyped",
    "config_file",
    "io",
    "data",
    "pretrained",
    "tasks.labels.teacher_cache",
    "plan",
    "bench",
    "figures",
    "study",
    "quickstart",
    "verbs.verb",
)

TOP_LEVEL = {
    *("balora_jax", "configs", "train.py", "tests", "colab", "docs", "pyproject.toml", "README.md"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".ci"),
}
MOST_LINES_OF_A_FILE = 450
MOST_OF_A_FOLDER = 0.15  # of the package's lines; of the models there are many
MOST_LINES_OF_A_FUNCTION = 50  # its docstring not counted; 30 is the aim


@cache
def syntax(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(path, kind):
    return [node for node in ast.walk(syntax(path)) if isinstance(node, kind)]


def short(module):
    """``balora_jax.pretrained.export`` as ``io.export``; the package itself as ``""``."""
    return module.removeprefix("balora_jax").removeprefix(".")


def imported(path):
    """Every module that a file imports, wherever the import stands."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: relative import"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            found.add(whole if whole in MODULES else str(node.module))
    return found


def inside(name, parents):
    return any(name == parent or (parent and name.startswith(parent + ".")) for parent in parents)


def layer_of(module):
    """The number of a module's line in the table, from the bottom."""
    lines = {name: i for i, names in enumerate(LAYERS) for name in names}
    found = [name for name in lines if inside(module, [name])]
    assert found, f"{module or '__init__'}: no line in LAYERS"
    return lines[max(found, key=len)]


def lines_without_docstring(function):
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def places(found):
    return "\n".join(f"{path.relative_to(ROOT)}:{line}: {text}" for path, line, text in found)


def test_imports_point_downward():
    wrong = []
    for module, path in MODULES.items():
        for target in sorted(imported(path)):
            ours = target.split(".")[0] == "balora_jax"
            upward = ours and layer_of(short(target)) > layer_of(short(module))
            if upward or (ours and short(module) in ALONE):
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_in_circles():
    graph = {
        module: {target for target in imported(path) if target in MODULES and target != module}
        for module, path in MODULES.items()
    }
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & set(graph)}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in leaves}


@pytest.mark.parametrize("layer", ["numerics", "models"])
def test_numerics_and_models_do_no_io(layer):
    roots = {
        (path.name, target.split(".")[0])
        for path in (PACKAGE / layer).rglob("*.py")
        for target in imported(path)
    }
    foreign = {(file, root) for file, root in roots if root not in PURE | {"balora_jax"}}
    assert not foreign


def test_only_the_edges_open_files():
    wrong = []
    for module, path in MODULES.items():
        if inside(short(module), MAY_OPEN):
            continue
        for call in nodes(path, ast.Call):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in READS_OR_WRITES:
                wrong.append((path, call.lineno, f"calls {name}"))
    assert not wrong, places(wrong)


def test_no_torch_and_no_pickle():
    banned = {"torch", "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    apart = "balora_jax.bench.torch_reference"  # run as a program, by those who ask for torch
    wrong = [
        (module, target)
        for module, path in MODULES.items()
        for target in imported(path)
        if target == apart or (module != apart and target.split(".")[0] in banned)
    ]
    for path in FILES:
        for call in nodes(path, ast.Call):
            for keyword in call.keywords:
                unsafe = keyword.arg in ("allow_pickle", "trust_remote_code")
                if unsafe and getattr(keyword.value, "value", None) is not False:
                    wrong.append((path, f"line {call.lineno}: {keyword.arg}"))
            if getattr(call.func, "id", "") in ("eval", "exec", "compile", "__import__"):
                wrong.append((path, f"line {call.lineno}: {call.func.id}"))
    assert not wrong


def test_one_file_shows_progress():
    """Others ask it for a bar, so that no log gets one line of carriage returns."""
    found = {module for module, path in MODULES.items() if "tqdm" in imported(path)}
    assert found == {"balora_jax.progress"}


def test_no_error_is_caught_blindly():
    wrong = []
    for name, path in MODULES.items():
        if short(name) == "untyped.native":  # parsers of others, whose errors have no type
            continue
        for handler in nodes(path, ast.ExceptHandler):
            caught = "" if handler.type is None else ast.unparse(handler.type)
            last = handler.body[-1]
            if isinstance(last, ast.Raise) and last.exc is None:  # it goes on as it came
                continue
            if not caught or re.search(r"\b(Base)?Exception\b", caught):
                wrong.append((path, handler.lineno, f"except {caught}"))
    assert not wrong, places(wrong)


def assigned(node):
    """Attributes of ``self`` that a piece of code assigns."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and getattr(part.value, "id", "") == "self"
    }


def test_objects_have_all_their_attributes_after_init():
    wrong = []
    for path in FILES:
        for kind in nodes(path, ast.ClassDef):
            methods = {f.name: f for f in kind.body if isinstance(f, ast.FunctionDef)}
            if "__init__" not in methods:
                continue
            had = assigned(methods["__init__"]) | {
                part.target.id for part in kind.body if isinstance(part, ast.AnnAssign)
            }
            wrong += [
                (path, method.lineno, f"{kind.name}.{name} makes self.{attribute}")
                for name, method in methods.items()
                for attribute in sorted(assigned(method) - had)
            ]
    assert not wrong, places(wrong)


def test_nothing_is_left_to_be_written():
    wrong = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError|NotImplemented)\b", line):
                wrong.append((path, number, line.strip()))
    assert not wrong, places(wrong)


def test_functions_and_files_are_short():
    wrong = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            wrong.append((path, 1, f"{lines} lines"))
        for function in nodes(path, ast.FunctionDef | ast.AsyncFunctionDef):
            length = lines_without_docstring(function)
            if length > MOST_LINES_OF_A_FUNCTION:
                wrong.append((path, function.lineno, f"{function.name} has {length} lines"))
    assert not wrong, places(wrong)


def test_no_folder_is_most_of_the_package():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    whole, shares = sum(lines.values()), {}
    for path, count in lines.items():
        folder = path.relative_to(PACKAGE).parts[0]
        shares[folder] = shares.get(folder, 0.0) + count / whole
    large = {name: share for name, share in shares.items() if share > MOST_OF_A_FOLDER}
    assert set(large) <= {"models"}, large


# The verbs and their rooms, and where a task makes its run: they are given a run's settings as a
# whole.
TAKE_ALL_SETTINGS = (
    *("config_file", "finetune", "verbs", "plan", "preview", "bench", "study", "figures"),
    "pretrained.export",  # the function behind a verb
    "tasks.settings",
    *("tasks.text.run", "tasks.text.program", "tasks.labels.run", "tasks.labels.program"),
)


def test_who_takes_the_settings_of_a_whole_run():
    """Everybody else takes the section that they need."""
    found = {}
    for module, path in MODULES.items():
        for function in nodes(path, ast.FunctionDef):
            given = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            kinds = (ast.unparse(one.annotation) for one in given if one.annotation)
            if any("RunConfig" in kind for kind in kinds):
                found.setdefault(short(module), []).append(function.name)
    wrong = {name: names for name, names in found.items() if not inside(name, TAKE_ALL_SETTINGS)}
    count = sum(map(len, found.values()))
    assert not wrong, f"{count} functions take all settings, these should not: {wrong}"


def test_only_a_task_asks_which_task_it_is():
    wrong = []
    for module, path in MODULES.items():
        for compared in nodes(path, ast.Compare):
            sides = (compared.left, *compared.comparators)
            asked = any(getattr(one, "attr", getattr(one, "id", "")) == "task" for one in sides)
            if asked and not inside(short(module), ("tasks", "config")):
                wrong.append((path, compared.lineno, ast.unparse(compared)))
    assert not wrong, places(wrong)


def test_every_module_says_what_it_is():
    silent = [module for module, path in MODULES.items() if not ast.get_docstring(syntax(path))]
    assert not silent


def test_no_boolean_argument_is_positional_in_public_functions():
    """``f(x, True)`` says nothing; a bool is a keyword, or the function is two."""
    wrong = []
    for path in FILES:
        for function in nodes(path, ast.FunctionDef):
            positional = [*function.args.posonlyargs, *function.args.args]
            defaults = function.args.defaults
            given = positional[len(positional) - len(defaults) :]
            for argument, default in zip(given, defaults, strict=True):
                boolean = isinstance(getattr(default, "value", None), bool)
                if boolean and not function.name.startswith("_"):
                    wrong.append((path, function.lineno, f"{function.name}({argument.arg}=…)"))
    assert not wrong, places(wrong)


SCHEMA = run_schema()
SECTIONS = {name: field.annotation for name, field in SCHEMA.model_fields.items()}
SECTIONS = {name: kind for name, kind in SECTIONS.items() if hasattr(kind, "model_fields")}


def config_keys():
    for section, kind in SECTIONS.items():
        for name in kind.model_fields:
            yield section, name


def attributes_read():
    """(what stands before the dot, attribute) of every attribute read outside config.py."""
    found = set()
    for module, path in MODULES.items():
        if short(module) in ("config", "config_data"):
            continue
        for node in nodes(path, ast.Attribute):
            before = getattr(node.value, "attr", getattr(node.value, "id", ""))
            found.add((before, node.attr))
    return found


READ = attributes_read()


# Another value of each key that the objective reads, and what else it then takes.
OTHER = {
    "variant": ("arxiv_v1", {}),
    "consistency": (0.5, {}),
    "diversity": (0.5, {}),
    "spectral": (0.5, {}),
    "temperature": (3.0, {}),
    "top_k": (7, {}),
    "k": (3, {}),
    "norm": ("nuclear", {}),
    "consistency_schedule": ("constant", {}),
    "diversity_schedule": ("constant", {}),
    "spectral_schedule": ("constant", {}),
    "warmup_fraction": (0.3, {"spectral_schedule": "linear_warmup"}),
    "adaptive_min": (0.01, {"consistency_schedule": "adaptive"}),
    "adaptive_max": (0.3, {"consistency_schedule": "adaptive"}),
    "mask_alignment": ("official", {}),
    "center_rows": (True, {}),
}


# Two sections are read as a whole: the tests after this one.
@pytest.mark.parametrize(
    ("section", "name"),
    [
        key
        for key in config_keys()
        if key[0] not in ("regularizers", "mesh") or key[1] in OF_THE_TEACHER
    ],
)
def test_every_setting_is_read(section, name):
    assert {(section, name), ("config", name)} & READ


def test_every_key_of_the_regularizers_changes_the_objective():
    section = SECTIONS["regularizers"]
    assert set(section.model_fields) - OF_THE_TEACHER == set(OTHER)
    for key, (value, beside) in OTHER.items():
        before, after = section(**beside), section(**beside, **{key: value})
        found = [objective_of(settings.of_the_terms()) for settings in (before, after)]
        assert found[0] != found[1], key


def test_the_sizes_of_a_mesh_are_those_of_its_axes():
    assert set(SECTIONS["mesh"].model_fields) == set(AXES)


def test_settings_that_may_change_on_resume_exist():
    known = {f"{section}.{name}" for section, name in config_keys()} | set(SCHEMA.model_fields)
    assert set(FREE_KEYS) <= known


def test_every_setting_is_explained():
    for section, kind in SECTIONS.items():
        # Python 3.13 takes the indentation off by itself.
        text = inspect.cleandoc(kind.__doc__ or "").split("Attributes:")[-1]
        heads = re.findall(r"^ {4}(\w[\w, ]*):", text, flags=re.MULTILINE)
        explained = {name.strip() for head in heads for name in head.split(",")}
        assert explained == set(kind.model_fields), section


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project()["version"] == balora_jax.__version__
    assert f"\nversion: {balora_jax.__version__}\n" in citation
    assert re.search(r"^## \[(\d[\w.]*)\]", changes, flags=re.MULTILINE).group(1) == (
        balora_jax.__version__
    )


def test_only_the_agreed_names_at_the_top():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    names = {name.split("/")[0] for name in listed}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
    assert {n for n in names if n.startswith(".")} <= {
        ".ci",
        ".gitignore",
        ".gitattributes",
        ".pre-commit-config.yaml",
    }
