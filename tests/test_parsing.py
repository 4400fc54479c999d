"""What PyYAML and json take without a word, and what makes them hang, is refused with its line."""

import time

import pytest
import yaml

from topd.parsing import read_json, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: 2\na: 3\n", r"'a' appears more than once.*line 3"),
        ("x: {a: 1, a: 2}\n", "'a' appears more than once"),
        ("a: !!bool maybe\n", r"'maybe' cannot be read as bool.*line 1"),
        ("a: !!int x\n", "'x' cannot be read as int"),
        ("a: !!timestamp x\n", "cannot be read as timestamp"),
        ("seed: " + "9" * 5000, "cannot be read as int"),
        ("seed: 0x" + "f" * 5000, "too large"),
        ("a: [1\n", "line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: &a [*a]\n", "contains it"),
        ("[" * 5000, "nested more than 100 deep, line 1"),
        (BOMB, "more than 100,000 values"),
    ],
)
def test_what_is_wrong_in_yaml_is_named(text, found):
    started = time.process_time()
    with pytest.raises(ValueError, match=found) as raised:
        read_yaml(text)
    assert len(str(raised.value)) < 400
    assert time.process_time() - started < 2


def test_other_yaml_is_read_as_pyyaml_reads_it():
    text = "a: &a {x: 1, y: [1.5, null, yes, 2020-01-01]}\nb: *a\nc: {<<: *a, x: 2}\nd: 0x10\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None


def test_json_with_a_name_twice_is_refused():
    assert read_json('[{"a": 1}, {"a": 2, "b": {"a": 3}}]') == [{"a": 1}, {"a": 2, "b": {"a": 3}}]
    with pytest.raises(ValueError, match="'a' appears more than once"):
        read_json('{"x": [{"a": 1, "b": 2, "a": 1}]}')
