"""Read YAML and JSON that people write, and reject what PyYAML and `json` accept silently, with the line to fix.

Rejected are names that appear twice (the last one would win), aliases that expand to more than `MOST_NODES` values,
whole numbers too large for any option, and values that do not fit their tag.
"""

import json
from collections.abc import Sequence
from typing import Any

import yaml

MOST_NODES = 100_000
"""Limit of values in a YAML file with its aliases expanded: 500 bytes can expand to billions. Our choice."""

MOST_DEPTH = 100
"""Limit of nested values in a YAML file: PyYAML's time grows with the square of the depth. Our choice."""


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: a name appears twice in an object, or a number is too long.
        RecursionError: lists are nested too deep.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        keys = [name for name, _ in pairs]
        twice = next(name for name in names if keys.count(name) > 1)
        raise ValueError(f"{twice!r:.60} appears more than once in an object; remove one")
    return names


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or is rejected as the module says. The message names the line.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, with the line of a value that does not fit its tag, and of values that are nested too deep."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            mark = self.peek_event().start_mark
            raise ValueError(f"values are nested more than {MOST_DEPTH} deep, line {mark.line + 1}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            shown = node.value if isinstance(node.value, str) else "a value"
            raise _error(node, f"{shown[:60]!r} cannot be read as {kind}") from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _error(node, "this whole number is too large")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[Any] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in names:
                    raise _error(name, f"{name.value[:60]!r} appears more than once; remove one")
                names.add(name.value)
        return super().construct_mapping(node, deep)


def _error(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _check_size(root: yaml.Node) -> None:
    """Raise if expanded aliases make too many values, or a value that contains itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise _error(node, "an alias stands for a value that contains it")
        if known is None:
            sizes[id(node)] = 0
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            known = sizes[id(node)] = 1 + sum(map(size, parts))
        if known > MOST_NODES:
            raise _error(node, f"its aliases expand to more than {MOST_NODES:,} values")
        return known

    size(root)
