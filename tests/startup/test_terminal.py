"""terminal.py: a run goes on where nobody reads what it prints."""

import os
import subprocess
import sys

import pytest
from helpers.runs import REPOSITORY as ROOT


def child(code: str, **streams) -> subprocess.Popen:
    """Run Python code that starts as main.py does."""
    start = "import sys; from startup import terminal; terminal.outlive_readers(); "
    return subprocess.Popen([sys.executable, "-c", start + code], cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize(
    "code",
    [
        "print('a'); print('b', flush=True); sys.exit(3)",
        "print('x' * 10**6); print('y' * 10**6); sys.exit(3)",
        "print('only at exit'); sys.exit(3)",
        "sys.stdout.write('a' * 10**5); sys.stdout.flush(); sys.exit(3)",
    ],
)
def test_a_reader_that_leaves_ends_nothing(code):
    """The exit status is the program's own, and nobody hears of a broken pipe."""
    process = child(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 3


def test_a_second_run_in_one_process_prints_too():
    process = child("terminal.outlive_readers(); print('here')", stdout=subprocess.PIPE)
    assert process.communicate()[0] == "here\n" and process.returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start(closed, tmp_path):
    code = "open('file', 'w').write(str(print('a')) + str(sys.stderr.isatty())); sys.exit(3)"
    start = "import sys; from startup import terminal; terminal.outlive_readers(); "
    command = f'exec "$0" -c "$1" {closed}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, start + code], cwd=tmp_path, env=environment
    )
    assert done.returncode == 3 and (tmp_path / "file").read_text() == "NoneFalse"


def test_what_a_terminal_cannot_show_is_escaped():
    streams = {"stdout": subprocess.PIPE, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    out, _ = child("print('ü \\udcff')", **streams).communicate()
    assert out == "\\xfc \\udcff\n"


def test_head_ends_a_dry_run_without_a_traceback(tmp_path):
    words = ["data.name=digits", "model.name=lenet", f"output_dir={tmp_path}", "--dry_run"]
    command = [sys.executable, "main.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
