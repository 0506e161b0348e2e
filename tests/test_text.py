"""Files of ours are UTF-8 in every locale: whoever opens one as text names the encoding."""

import ast
from collections.abc import Iterator

import pytest
from helpers.runs import REPOSITORY

SOURCES = sorted(
    path for room in ("data", "bandwidth_analysis") for path in (REPOSITORY / room).glob("*.py")
)


def openings_without_encoding(source: str) -> Iterator[str]:
    """Calls of open(), read_text() and write_text() that leave the encoding to the locale."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        words = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        modes = [word.value for word in words if isinstance(word, ast.Constant)]
        is_binary = any("b" in str(mode) for mode in modes)
        is_method = isinstance(call.func, ast.Attribute)
        if name in ("read_text", "write_text") or (
            name == "open" and not is_binary and (not is_method or modes or not call.args)
        ):
            yield f"line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_text_file_is_opened_as_utf_8(path):
    assert list(openings_without_encoding(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source", ["open(p)", "open(p, 'w')", "p.open()", "p.open('a')", "p.read_text()"]
)
def test_the_reader_of_openings_sees(source):
    assert len(list(openings_without_encoding(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'rb')",
        "p.open('wb')",
        "p.open(encoding='utf-8')",
        "Image.open(p)",
        "zip.open(name)",
    ],
)
def test_the_reader_of_openings_lets_pass(source):
    assert list(openings_without_encoding(source)) == []
