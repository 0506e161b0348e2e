"""Reads a YAML file and `key=value` words as the types of config.py's fields.

YAML by itself guesses a type from how a value looks: 012 is octal, 3e5 a number, on is true. Here
a value is text until its field says what it is. Only an option of a dict field may be of any type:
its type is guessed where there is one reading, and the option is refused where there are two.

A relative path starts from the project folder in a YAML file, and from the working directory on the
command line; `~` is the home folder in both.
"""

import difflib
import math
import os
import re
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from config import PROJECT, UNCLEAR, Config, ConfigError

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
FROM_TEXT = {str: str, int: int, float: float, bool: lambda text: BOOLEANS[text.lower()]}
EXPECTED = {
    str: "text",
    int: "a whole number, such as 3",
    float: "a number, such as 0.1",
    bool: "true or false",
    list: "a list, [...]",
    dict: "keys and values, {a: 1}",
}
NULLS = ("", "~", "null", "Null", "NULL")
WHOLE_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)")
NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
NOT_UTF8 = re.compile("[\0\ud800-\udfff]")  # Python keeps an odd byte as a lone surrogate
TEXT, LIST, MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
Section = TypeVar("Section")


class Settings:
    """The values that were written down, by dotted key, and the place of each key."""

    def __init__(self, file: Path):
        """Read a YAML file. Raises ConfigError: unreadable, not YAML, unknown key, wrong type."""
        self.values: dict[str, Any] = {}
        self.places = {"": str(file)}  # "x.yaml:4" or "command line"; sections have a place, too
        try:
            root = compose(file.read_text(encoding="utf-8"))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}; give a YAML file to --config"
            raise ConfigError(f"{file}: {reason}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: cannot be read: not UTF-8 text; save it as UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{file}{line}: not valid YAML: {_reason(error)}") from None
        if isinstance(root, yaml.MappingNode):
            self._add_section(root, Config, "", file)
        elif root:
            raise ConfigError(f"{file}:1: a config is a list of `key: value` lines")

    def override(self, word: str) -> None:
        """Read one `key=value` of the command line. Raises ConfigError as for a file."""
        if not re.match(r"[A-Za-z_][\w.]*=", word):
            raise ConfigError(f"command line: {word!r} is not of the form key=value")
        dotted, _, text = word.partition("=")
        names, key, kind = dotted.split("."), "", Config
        while names and is_dataclass(kind):  # down to the field that the key names
            field = _find_field(kind, names[0], key, "command line")
            key, kind = _join(key, names.pop(0)), field.type
            self.places[key] = "command line"
        if names and get_origin(kind) is not dict:
            raise ConfigError(f"command line: {dotted}: no such key; {key} takes a value")
        if NOT_UTF8.search(text):
            raise ConfigError(f"command line: {dotted}: {text!r} is not UTF-8 text")
        if not text and kind is not str:
            raise ConfigError(f"command line: {dotted}: nothing stands after the =")
        try:
            node = _parse(text, Any if names else kind)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: {word}: {_reason(error)}") from None
        before = self.values.get(key)
        if names:
            node = yaml.MappingNode(MAPPING, [(yaml.ScalarNode(TEXT, ".".join(names)), node)])
        self._add(node, field, key, None)
        if names and before:  # one option of a dict: the others stay
            self.values[key] = before | self.values[key]

    def place(self, key: str) -> str:
        """Where a key stands, or the nearest section above it that was written down."""
        while key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key]

    def config(self) -> Config:
        """The defaults, changed by what was written down."""
        return _changed(Config(), self.values)

    def _add_section(self, node: yaml.MappingNode, section: type, prefix: str, file: Path | None):
        for name, value in node.value:
            place = f"{file}:{name.start_mark.line + 1}" if file else "command line"
            field = _find_field(section, name.value, prefix, place)
            key = _join(prefix, name.value)
            self.places[key] = place
            self._add(value, field, key, file)

    def _add(self, node: yaml.Node, field: Field, key: str, file: Path | None) -> None:
        """Add what a key's node says; `file` is None for the command line."""
        if is_dataclass(field.type) and isinstance(node, yaml.MappingNode):
            self._add_section(node, field.type, key, file)
            return
        try:
            self.values[key] = _convert(node, field.type)
            if "path" in field.metadata and self.values[key]:
                base = PROJECT if file else Path.cwd()
                self.values[key] = _from_project(self.values[key], base)
        except ValueError as error:
            raise ConfigError(f"{self.places[key]}: {key}: {error}") from None


# --- from text to YAML's tree -----------------------------------------------------------------


def compose(text: str) -> yaml.Node | None:
    """YAML's tree of a text, every value of it as text. Raises YAMLError."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if root:
            _check_tree(root)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return root


def _check_tree(node: yaml.Node) -> None:
    """Raises YAMLError for odd text, a tag, a key that is no word, and a key given twice."""

    def refuse(problem: str, node: yaml.Node) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    if node.tag not in (TEXT, LIST, MAPPING):
        refuse(f"the tag {node.tag!r} has no meaning here", node)
    if isinstance(node, yaml.ScalarNode) and NOT_UTF8.search(node.value):
        refuse(f"{node.value!r} is not UTF-8 text", node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_tree(item)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                refuse("a key must be a word", key)
            if key.value in seen:
                refuse(f"found duplicate key {key.value}", key)
            seen.add(key.value)
            _check_tree(key)
            _check_tree(value)


def _parse(text: str, kind: Any) -> yaml.Node:
    """The tree of a value of the command line: text as it stands, or YAML where it may have parts.

    Raises YAMLError.
    """
    may_have_parts = kind is Any or is_dataclass(kind) or get_origin(kind) in (list, dict)
    if not may_have_parts or text[:1] not in ("[", "{", "'", '"'):
        return yaml.ScalarNode(TEXT, text)
    node = compose(text)
    if node.end_mark.index < len(text):  # YAML would take it for a comment
        raise yaml.YAMLError(f"{text[node.end_mark.index :]!r} is too much")
    return node


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


# --- from YAML's tree to values -----------------------------------------------------------------


def _find_field(section: type, name: str, prefix: str, place: str) -> Field:
    """The field of a section with that name. Raises ConfigError, with the nearest name."""
    known = {f.name: f for f in fields(section)}
    if name not in known:
        hint = _nearest(name, list(known))
        raise ConfigError(f"{place}: {_join(prefix, name)}: no such key; {hint}")
    return known[name]


def _nearest(key: str, names: list[str]) -> str:
    """A hint by spelling, or by initials: learning_rate is called lr here."""
    initials = "".join(word[0] for word in key.split("_") if word)
    near = [initials] if initials in names else difflib.get_close_matches(key, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(names)}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _convert(node: yaml.Node, kind: Any) -> Any:
    """What a node says, as a value of that type. Raises ValueError: what would be right."""
    others = get_args(kind)[1:] if isinstance(kind, UnionType) else ()
    is_optional, may_be_auto = type(None) in others, str in others  # int | None, float | str
    kind = get_args(kind)[0] if others else kind
    origin = get_origin(kind) or kind
    is_plain = isinstance(node, yaml.ScalarNode) and not node.style
    if is_optional and is_plain and node.value in NULLS:
        return None
    if may_be_auto and isinstance(node, yaml.ScalarNode) and node.value == "auto":
        return "auto"
    if origin is list and isinstance(node, yaml.SequenceNode):
        return [_convert(item, get_args(kind)[0]) for item in node.value]
    if origin is dict and isinstance(node, yaml.MappingNode):
        return _guess(node)
    means_null = kind is str and is_plain and node.value in ("null", "Null", "NULL", "None")
    if origin in FROM_TEXT and isinstance(node, yaml.ScalarNode) and not means_null:
        try:
            return FROM_TEXT[origin](node.value)
        except (ValueError, KeyError):
            pass
    section = is_dataclass(kind) and f"keys below it ({', '.join(f.name for f in fields(kind))})"
    null = ", or null" * is_optional + ", or auto" * may_be_auto
    raise ValueError(f"takes {section or EXPECTED[origin]}{null}, not {_show(node)}")


def _from_project(path: str, base: Path) -> str:
    """A path that starts from `base`, as it is written in the project folder.

    A relative one stays relative, and so does an absolute one below the project folder: they hold
    when the project is moved. Raises ValueError if `~user` is nobody who is known.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path!r} starts with the home folder of an unknown user") from None
    is_elsewhere = given.is_absolute() and not given.is_relative_to(PROJECT)
    return str(given) if is_elsewhere else os.path.relpath(base / given, PROJECT)


def _guess(node: yaml.Node) -> Any:
    """The value of an option of any type. Raises ValueError where text could be two things."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _guess(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_guess(item) for item in node.value]
    text = node.value
    if node.style:  # it stands in quotes
        return text
    if text in NULLS:
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if UNCLEAR.fullmatch(text):
        reason = "write a number, true, false or null, or put text in quotes"
        raise ValueError(f"{text!r} could mean several things; {reason}")
    return text


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"


def _changed(section: Section, values: dict[str, Any], prefix: str = "") -> Section:
    """A section with the values that were given for its dotted keys."""
    changes = {}
    for f in fields(section):
        key, value = _join(prefix, f.name), getattr(section, f.name)
        is_section = is_dataclass(value)
        changes[f.name] = _changed(value, values, key) if is_section else values.get(key, value)
    return replace(section, **changes)
