"""The boundaries of the design, read from the source: who may import whom, and who may draw."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import REPOSITORY as ROOT

FOLDERS = "startup data compressors wire training network federation bandwidth_analysis".split()
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])
OURS = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)

# A sweep is refused in the words of the command lines that it will start, before any of them does.
EXCEPTIONS = {
    "bandwidth_analysis/sweep_file.py": {"command_line", "config", "startup"},
    "bandwidth_analysis/sweep.py": {"command_line", "config", "startup"},
}

# What a file or the files of a folder may import of ours, besides their own folder.
NOTHING: set[str] = set()
MAY_IMPORT = {
    "config": NOTHING,
    "layout": NOTHING,
    "compiled": NOTHING,
    "algorithms": NOTHING,
    "data": NOTHING,
    "network": NOTHING,
    "bandwidth_analysis": NOTHING,
    "pruning": {"compiled", "layout"},
    "afo": {"compiled", "algorithms"},  # both look names up in a table in the same words
    "cnn_model": {"layout"},
    "startup": {"config"},
    "distributed": {"config", "startup"},
    "wire": {"layout", "compiled"},
    "compressors": {"wire", "layout", "compiled"},
    "compression": {"compressors", "wire", "layout", "compiled"},
    "training": {"cnn_model", "layout", "data", "distributed", "config"},
}
# Files of federation that know both ends and the network: the schedules, settings and set-up.
SCHEDULES = {"synchronous", "buffered", "hierarchical", "gossip"}
SCHEDULES |= {"federation", "schedules", "schedule_settings", "setup", "clock"}
# Over 400 lines, or with functions over 50, each with its reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def imports(source: str, whole: bool = False) -> set[str]:
    """The top-level (or whole) names of all modules that `source` imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names if whole else {name.partition(".")[0] for name in names}


def imports_of(path: Path, whole: bool = False) -> set[str]:
    return imports(path.read_text(), whole)


def room(path: Path) -> str:
    """The folder of a file, or its name where it stands at the top."""
    return path.stem if path.parent == ROOT else path.parent.relative_to(ROOT).parts[0]


def test_the_reader_of_imports_sees_them_all():
    source = (
        "import a.b, c as d\ndef f():\n    from e.g import h\nfrom . import i\nfrom .j import k"
    )
    assert imports(source) == {"a", "c", "e"}
    assert imports(source, whole=True) == {"a.b", "c", "e.g", "e.g.h"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_imports_only_what_its_room_may(path):
    here = room(path)
    found = imports_of(path) & OURS - {here}
    assert not found & {"main", "main_resnet50"}
    more = EXCEPTIONS.get(str(path.relative_to(ROOT)), NOTHING)
    assert found <= MAY_IMPORT.get(here, OURS) | more, found
    if here not in ("compression", "compressors"):
        assert "wire" not in found, "only compression and the compressors know the wire"
    if here != "experiment":
        assert "run_folder" not in found, "only experiment knows the run folder"


@pytest.mark.parametrize("path", sorted((ROOT / "federation").glob("*.py")), ids=lambda p: p.stem)
def test_the_two_ends_never_meet_outside_a_schedule(path):
    found = imports_of(path, whole=True)
    ends = {end for end in ("client", "server") for name in found if name == f"federation.{end}"}
    assert len(ends) < 2 or path.stem in SCHEDULES, "only a schedule knows both ends"
    assert not (path.stem in ("client", "server") and ends), "the ends never import each other"
    if path.stem not in SCHEDULES:
        assert "network" not in imports_of(path), "only a schedule knows the network"


@pytest.mark.parametrize(
    "name", ["config", "command_line", "layout", "startup/typed_yaml", "network/simulation"]
)
def test_files_that_need_no_torch_import_none(name):
    found = imports_of(ROOT / f"{name}.py")
    assert not found & {"torch", "torchvision", "accelerate", "deepspeed"}


def test_the_command_line_is_imported_without_torch():
    """A misspelt key is answered at once: what is imported first imports no torch either."""
    code = (
        "import sys, command_line; sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_imports_another_and_each_stands_where_its_subject_does(path):
    assert not {name for name in imports_of(path) if name.startswith(("test_", "conftest"))}
    folder = path.parent.relative_to(ROOT / "tests")
    assert (ROOT / folder).is_dir()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_or_named_with_a_reason(path):
    name, source = str(path.relative_to(ROOT)), path.read_text()
    assert (len(source.splitlines()) > 400) == (name in LONG_FILES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            is_long = node.end_lineno - node.lineno + 1 > 50
            assert is_long == (f"{name}:{node.name}" in LONG_FUNCTIONS), node.name


# --- draws ----------------------------------------------------------------------------------------

NUMPY_GENERATORS = {"default_rng", "Generator", "SeedSequence", "PCG64", "BitGenerator"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
TORCH_DRAWS |= {"rand_like", "randn_like", "randint_like", "poisson"}


def dotted(node: ast.expr) -> str:
    """np.random.rand as a string; "" for what is not a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_draws(source: str) -> Iterator[str]:
    """Calls that read or seed a global generator, but for those below a `with ...fork_rng(...)`."""
    tree = ast.parse(source)
    sheltered = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "fork_rng" in ast.unparse(node.items[0])
        for inner in ast.walk(node)
    }
    if "random" in imports(source):
        yield "import random"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in sheltered:
            continue
        library, _, name = dotted(node.func).rpartition(".")
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        in_numpy = library in ("np.random", "numpy.random") and name not in NUMPY_GENERATORS
        seeds = library in ("torch", "torch.random", "torch.cuda") and "seed" in name
        draws = library == "torch" and name in TORCH_DRAWS and not has_generator
        unseeded = name == "default_rng" and not node.args and not node.keywords
        if in_numpy or seeds or draws or unseeded:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_draws_from_a_global_generator(path):
    assert list(global_draws(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "np.random.rand(3)",
        "numpy.random.seed(1)",
        "np.random.default_rng()",
        "torch.manual_seed(1)",
        "torch.cuda.manual_seed_all(1)",
        "torch.randperm(3)",
        "import random",
        "from random import shuffle",
    ],
)
def test_the_reader_of_draws_sees(source):
    assert len(list(global_draws(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "np.random.default_rng(1).random(3)",
        "torch.Generator(device).manual_seed(seed)",
        "torch.randperm(3, generator=g)",
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(1)",
        "rng.choice(3)",
    ],
)
def test_the_reader_of_draws_lets_pass(source):
    assert list(global_draws(source)) == []
