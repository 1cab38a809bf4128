"""Where configuration values come from: the YAML file, the environment, flags; each value with its place.

Owns reading the sources and telling which keys exist; refuses to know what a value means (`config_values` does). Faults
are collected, not raised, so that an operator sees all of them at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import yaml

from netfence.policy.prefix import shown

ENV_PREFIX: Final = "NETFENCE_"
MAX_FILE: Final = 1 << 20
"""Bytes of a configuration file: a real one has a few kilobytes, and a wrong path may name anything."""

_MAX_DEPTH: Final = 8  # the deepest key (control_plane.tls.ca) has three levels; also ends aliases that hold themselves
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


class Given(NamedTuple):
    """A value as it was given and where: `file F:12`, `environment NETFENCE_X`, `flag`."""

    value: object
    source: str


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys there are, as dotted paths: those with a value, and the sections that hold others."""

    leaves: Collection[str]
    sections: Collection[str]

    def unknown(self, source: str, path: str, value: object) -> str:
        """Return the message about a key that does not exist, with the nearest one that does."""
        section, _, name = path.rpartition(".")
        prefix = f"{section}." if section in self.sections else ""
        here = sorted({key[len(prefix) :].partition(".")[0] for key in self.leaves if key.startswith(prefix)})
        near = self._nearest(path, name, prefix, here)
        where = f"in {section}" if prefix else "at the top"
        hint = f"did you mean {near}?" if near else f"known {where} are {', '.join(here)}"
        return f"{source}: {path}: unknown key (value {shown(str(value))}); {hint}"

    def _nearest(self, path: str, name: str, prefix: str, here: Collection[str]) -> str | None:
        """Return the key that was likely meant: a like name here, the name in another section, a like path."""
        if prefix or "." not in path:
            close = difflib.get_close_matches(name, here, n=1, cutoff=0.7)
            if close:
                return prefix + close[0]
        by_name = {key.rpartition(".")[2]: key for key in self.leaves}
        close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.85)
        if close:
            return by_name[close[0]]
        close = difflib.get_close_matches(path, self.leaves, n=1, cutoff=0.85)
        return close[0] if close else None


def from_file(path: Path, keys: Keys, faults: list[str]) -> dict[str, Given]:
    """Read a YAML file into values by path; faults of reading, syntax and unknown keys are noted."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            faults.append(f"file {path}: larger than {MAX_FILE} bytes, so not a configuration file")
            return {}
        node = yaml.compose(data, Loader=yaml.SafeLoader)
    except OSError as error:
        faults.append(f"file {path}: cannot be read: {error.strerror}; give the path of a readable YAML file")
        return {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        faults.append(f"file {path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        faults.append(f"file {path}:1: not YAML: not UTF-8 text, control characters in it, or nested too deep")
        return {}
    reader = _FileReader(path, keys, faults)
    if node is not None:
        reader.section(node, "")
    return reader.values


class _FileReader:
    """Walks the YAML nodes along the known keys."""

    def __init__(self, path: Path, keys: Keys, faults: list[str]) -> None:
        self.values: dict[str, Given] = {}
        self._path = path
        self._keys = keys
        self._faults = faults

    def _place(self, node: yaml.Node) -> str:
        return f"file {self._path}:{node.start_mark.line + 1}"

    def section(self, node: yaml.Node, path: str) -> None:
        """Read the keys of a section."""
        if isinstance(node, yaml.ScalarNode) and _scalar(node) is None:
            return  # `dns:` with nothing under it
        if not isinstance(node, yaml.MappingNode):
            what = f"{path}: " if path else ""
            self._faults.append(f"{self._place(node)}: {what}{_described(node)}: allowed is a mapping of keys")
            return
        for name, key_node, value_node in self._pairs(node, path):
            inner = f"{path}.{name}" if path else name
            if inner in self._keys.sections:
                self.section(value_node, inner)
            elif inner in self._keys.leaves:
                try:
                    self.values[inner] = Given(_plain(value_node), self._place(key_node))
                except ValueError as fault:
                    self._faults.append(f"{self._place(key_node)}: {inner}: {fault}")
            else:
                self._faults.append(self._keys.unknown(self._place(key_node), inner, _described(value_node)))

    def _pairs(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Yield (name, key node, value node); keys that are no text or stand twice are faults."""
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._faults.append(f"{self._place(key_node)}: {path or 'the file'}: a key must be a text")
                continue
            name = str(key_node.value)
            if name in seen:
                where = f"{path}.{name}" if path else name
                self._faults.append(f"{self._place(key_node)}: {where}: stands twice")
                continue
            seen.add(name)
            yield name, key_node, value_node


def _scalar(node: yaml.ScalarNode) -> str | None:
    """Return the text; None for an unquoted nothing."""
    text = str(node.value)
    return None if node.style is None and text in _NULLS else text


def _plain(node: yaml.Node, depth: int = 0) -> object:
    """Return a value's texts, lists and mappings. ValueError when nested too deep or a key is no text or twice."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, depth + 1) for item in node.value]
    result: dict[object, object] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError("a key must be a text")  # noqa: TRY004 - the file is wrong, not our type
        if key_node.value in result:
            raise ValueError(f"{shown(str(key_node.value))} stands twice")
        result[str(key_node.value)] = _plain(value_node, depth + 1)
    return result


def _described(node: yaml.Node) -> str:
    """Return a short form of a value for messages, without following what it holds."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def from_environ(environ: Mapping[str, str], keys: Keys, faults: list[str]) -> dict[str, Given]:
    """Read NETFENCE_DNS__LISTEN_ADDR and the like; names are compared without case, unknown ones are faults."""
    by_variable = {ENV_PREFIX + path.upper().replace(".", "__"): path for path in keys.leaves}
    values: dict[str, Given] = {}
    for name in sorted(environ):
        if not name.upper().startswith(ENV_PREFIX):
            continue
        source = f"environment {name}"
        path = by_variable.get(name.upper())
        if path is None:
            meant = name[len(ENV_PREFIX) :].lower().replace("__", ".")
            if meant in keys.sections:
                faults.append(f"{source}: {meant}: a section; set its keys one by one, as {name.upper()}__NAME")
            else:
                faults.append(keys.unknown(source, meant, environ[name]))
        elif path in values:
            faults.append(f"{source}: {path}: given twice, also as {values[path].source}")
        else:
            try:
                values[path] = Given(_from_text(environ[name]), source)
            except yaml.YAMLError as error:
                faults.append(f"{source}: {path}: {shown(environ[name])}: not YAML: {error.__class__.__name__}")
            except ValueError as fault:
                faults.append(f"{source}: {path}: {shown(environ[name])}: {fault}")
    return values


def _from_text(text: str) -> object:
    """Return a variable's value: YAML where it looks like a YAML list or mapping, nothing where it is empty."""
    stripped = text.strip()
    if not stripped:
        return None
    # "[::1]:53" begins like a list and is none.
    if (stripped[0], stripped[-1]) in (("[", "]"), ("{", "}")):
        node = yaml.compose(stripped, Loader=yaml.SafeLoader)
        return None if node is None else _plain(node)
    return text


def from_flags(flags: Mapping[str, object], keys: Keys, faults: list[str]) -> dict[str, Given]:
    """Take the flags that were given (None was not)."""
    faults += [keys.unknown("flag", path, value) for path, value in flags.items() if path not in keys.leaves]
    return {path: Given(value, "flag") for path, value in flags.items() if path in keys.leaves and value is not None}
