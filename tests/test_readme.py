"""README's commands in README's order, in one checkout: none of them gets in another's way."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.configs import CONFIGS, small
from helpers.runs import REPOSITORY, SCRIPTS

from command_line import load_config

# One process does what `python ...` would do in a process each: importing torch takes seconds.
RUN_ALL = """
import json, runpy, subprocess, sys
statuses = []
for words in json.load(open(sys.argv[1])):
    try:
        if words[0] != "python":
            sys.exit(subprocess.run(words).returncode)
        sys.argv = words[1:] if words[1] != "-m" else words[2:]
        run = runpy.run_module if words[1] == "-m" else runpy.run_path
        run(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    print(*words, "->", status, flush=True)
    statuses.append(status)
json.dump(statuses, open("statuses.json", "w"))
"""


def commands_in_order() -> list[list[str]]:
    """The words of each command that runs the project, and two rounds for a thousand."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    lines = [line.rpartition("&&")[2] for block in blocks for line in block.splitlines()]
    commands = [
        shlex.split(line.replace("rounds=1000", "rounds=2"), comments=True) for line in lines
    ]
    return [words for words in commands if words and words != ["python", "-m", "pytest"]]


def make_checkout(folder):
    """A checkout in which the configs are of small networks, few clients and two rounds."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    for name in filter(None, files.split("\0")):
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    for path in (folder / config.relative_to(REPOSITORY) for config in CONFIGS):
        own_name = [f"name={path.stem}", "model.width=0.125"]
        path.write_text(load_config(path, [*small(path), *own_name]).to_yaml())


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path):
    make_checkout(tmp_path)
    commands = commands_in_order()
    assert len(commands) > 20
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, "commands.json"],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    assert statuses == [0] * len(commands), done.stdout
    planned = [words for words in commands if "--dry_run" in words]
    training = [words for words in commands if "-m" not in words and words not in planned]
    # Small configs are all of fp32, so that a command that asks for it is another one's run.
    ended = re.findall(r"^(?:results: |\S+ is finished: )", done.stdout, re.M)
    assert len(ended) == len(training), done.stdout
