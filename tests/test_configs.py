"""Every config runs two rounds, and what the repository says about itself is true."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers.configs import CONFIGS, small
from helpers.runs import REPOSITORY

from command_line import load_config, read_command_line
from experiment import main


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_two_rounds(path, tmp_path, monkeypatch):
    """One of them draws its plots, which takes longer than to train."""
    if path.stem != "default":
        monkeypatch.setattr("experiment.write_plots", lambda *_: [])
    config = load_config(path, [*small(path), f"output_dir={tmp_path}"])
    assert main(config) == 0
    assert (config.run_folder / "summary.json").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_run_folders_of_configs_differ_and_only_default_falls_back(path):
    config = load_config(path, [])
    assert config.name == path.stem
    assert bool(config.data.fallback) == (path.stem == "default")


def test_the_baseline_differs_from_its_twin_in_pruning_and_compression_only():
    twin, baseline = (
        yaml.safe_load(load_config(REPOSITORY / f"configs/{name}.yaml", []).to_yaml())
        for name in ("cifar10_resnet18", "baseline_fedavg")
    )
    differing = {key for key in twin if twin[key] != baseline[key]}
    assert differing == {"name", "pruning", "uplink"}


def requirement_lines(file: str = "requirements.txt") -> list[str]:
    text = (REPOSITORY / file).read_text()
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def test_conda_reads_the_one_list_of_packages():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"] and pip == {"pip": ["-r requirements.txt"]}


def imported(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    return {name.partition(".")[0] for name in names}


def test_every_import_is_in_the_list_of_packages():
    distribution = {
        "sklearn": "scikit-learn",
        "flwr_datasets": "flwr-datasets",
        "yaml": "PyYAML",
    }
    distribution |= {
        "datasets": "flwr-datasets",
        "PIL": "torchvision",
        "huggingface_hub": "flwr-datasets",
        "pydantic": "deepspeed",
    }
    lines = requirement_lines()
    for rivals in ("rivals", "frameworks"):
        lines += requirement_lines(f"benchmarks/requirements-{rivals}.txt")
    listed = {re.split(r"[\[<>=;!~ ]", line)[0] for line in lines}
    paths = [path for depth in ("", "*/", "*/*/") for path in REPOSITORY.glob(f"{depth}*.py")]
    ours = {path.stem for path in paths} | {path.parent.name for path in paths}
    for path in paths:
        for name in imported(path):
            if name not in sys.stdlib_module_names and name not in ours:
                assert distribution.get(name, name) in listed, (path, name)


def readme_commands() -> list[str]:
    """The lines of README.md's ```bash blocks, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def test_readme_begins_with_the_two_commands():
    assert readme_commands()[:2] == [
        "pip install -r requirements.txt && python main.py",
        "pip install -r requirements.txt && python -m pytest",
    ]


def test_every_training_command_in_the_readme_is_valid():
    """Each is parsed as the program would, so that no key or file in it can go stale."""
    defaults = {
        "main.py": "configs/default.yaml",
        "main_resnet50.py": "configs/cifar10_resnet50.yaml",
    }
    seen = 0
    for line in readme_commands():
        command = line.partition("#")[0].rpartition("&&")[2].split()
        for script, default in defaults.items():
            if script in command:
                words = command[command.index(script) + 1 :]
                read_command_line(str(REPOSITORY / default), words)
                seen += 1
    assert seen >= 5


DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]
DOCUMENTS += [REPOSITORY / "outputFolder/README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
FILE_NAME = re.compile(
    r"(?<![\w./*<>+-])[\w.-]*(?:/[\w.-]+)*\.(?:py|ya?ml|json|txt|md|cff|toml|png)\b"
)
EXAMPLES = {"configs/x.yaml", "compressors/natural.py", "federation/rotation.py"}


def files_of_a_run() -> set[str]:
    """The files that outputFolder/README.md lists."""
    text = (REPOSITORY / "outputFolder/README.md").read_text()
    return set(re.findall(r"^\| (\S+) \|", text, re.M))


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_files_that_documents_name_exist(document):
    """Outside of links, which the test above follows, they are named from the project folder."""
    if document.name == "LOG.md":
        pytest.skip("it names files as they were called on the day of an entry")
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"\[[^]]*(?=\]\()", "[", document.read_text()))
    for name in set(FILE_NAME.findall(text)) - EXAMPLES - files_of_a_run():
        assert (REPOSITORY / name).exists(), name


def test_the_tree_in_the_readme_has_every_folder_and_no_file_that_is_gone():
    [tree] = re.findall(
        r"^```\n(main\.py.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S
    )
    names = {name for line in tree.splitlines() for name in line.partition("  ")[0].split()}
    assert all((REPOSITORY / name).exists() for name in names)
    folders = {f"{path.parent.relative_to(REPOSITORY)}/" for path in REPOSITORY.glob("*/*.py")}
    assert folders <= names
