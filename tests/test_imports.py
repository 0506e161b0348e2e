"""The boundaries of DESIGN.md, read from the source: who may import whom, and who may draw."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("bandwidth_analysis/*.py")]
)
METHODS = (
    "pruning",
    "compression",
    "quantisers",
    "eden",
    "powersgd",
    "kernels",
    "entropy",
    "rangecoder",
    "rans",
    "contexts",
    "scan",
    "wire",
    "afo",
    "algorithms",
    "network",
)
MAY_IMPORT = {"compression": {"quantisers", "eden", "powersgd", "entropy", "kernels", "wire"}}
MAY_IMPORT |= dict.fromkeys(("quantisers", "eden", "powersgd"), {"kernels", "wire"})
MAY_IMPORT |= {
    "afo": {"kernels"},
    "entropy": {"contexts", "kernels", "rangecoder", "rans", "scan", "wire"},
}
MAY_IMPORT |= {
    "rangecoder": {"kernels", "wire"},
    "rans": {"kernels"},
    "contexts": {"kernels", "rangecoder", "rans"},
    "kernels": {"wire"},
    "scan": {"wire"},
}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"data", "bandwidth_analysis"}


def imports(source: str) -> set[str]:
    """The top-level names of all modules that `source` imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text())


def test_the_reader_of_imports_sees_them_all():
    source = (
        "import a.b, c as d\ndef f():\n    from e.g import h\nfrom . import i\nfrom .j import k"
    )
    assert imports(source) == {"a", "c", "e"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_know_neither_config_nor_each_other(name):
    assert imports_of(ROOT / f"{name}.py") & OURS <= MAY_IMPORT.get(name, set())


@pytest.mark.parametrize(
    "name", ["wire", "entropy", "rangecoder", "network", "config", "command_line"]
)
def test_files_that_need_no_torch_import_none(name):
    assert not imports_of(ROOT / f"{name}.py") & {"torch", "torchvision", "accelerate", "deepspeed"}


def test_config_is_read_without_torch():
    """What config imports imports no torch either: an error is instant."""
    code = (
        "import sys, command_line; sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()) != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_an_entry_point(path):
    assert not imports_of(path) & {"main", "main_resnet50"}


def test_data_and_the_analysis_stand_alone():
    for folder in ("data", "bandwidth_analysis"):
        for path in (ROOT / folder).glob("*.py"):
            assert imports_of(path) & OURS <= {folder}, path


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
