"""The page shows what a run was made of, whatever its run.yaml holds."""

import yaml
from made_records import write_arm

from topd.report.page import write_report
from topd.report.reading import read_run_file

RECORD = {
    "command": "topd train --config <b>.yaml",
    "time": "2026-11-29T12:00:00+00:00",
    "versions": {"topd": "0.1.0", "torch": "2.13.0"},
    "precision": {"student": "float32", "computed": "bfloat16 autocast"},
    "device": "cpu",
    "processes": 2,
    "student": {
        "name": "org/student", "revision": "abc", "architecture": "Qwen3ForCausalLM", "parameters": 500_000,
        "trained": 500_000, "dtype": "float32", "weights": "f00",
    },
    "teacher": {"name": "org/teacher", "architecture": "Qwen3ForCausalLM", "parameters": None},
    "data": {"rows": 4096, "digest": "d1"},
    "resumed": [{"from": "checkpoint-2", "changed": ["learning_rate: 0.001 -> 0.0001"]}],
}  # fmt: skip


def page_of(folder, content):
    write_arm(folder, [], logged=2)
    (folder / "run.yaml").write_text(content)
    return write_report(folder).read_text()


def test_models_data_command_and_changes_are_on_the_page(tmp_path):
    page = page_of(tmp_path / "run", yaml.safe_dump({"seed": 1, "provenance": RECORD}, sort_keys=False))
    for text in (
        "org/student at abc: Qwen3ForCausalLM, 500,000 parameters, 500,000 trained, float32, weights f00",
        "org/teacher: Qwen3ForCausalLM, an unknown number of parameters", "4,096 prompts, digest d1",
        "topd train --config &lt;b&gt;.yaml", "student float32, computed bfloat16 autocast", "2 × cpu",
        "from checkpoint-2 (learning_rate: 0.001 -&gt; 0.0001)", 'href="#provenance"',
    ):  # fmt: skip
        assert text in page
    assert "Some records could not be read" not in page


def test_a_run_yaml_that_cannot_be_read_is_noted_and_odd_values_are_shown(tmp_path):
    for number, content in enumerate(("a: [", "a: 1\na: 2\n", "&a [*a]")):
        assert f"{number}/run.yaml cannot be read" in page_of(tmp_path / str(number), content)
    odd = {
        "student": {"architecture": [1], "parameters": "x"},
        "data": {"rows": [2]},
        "resumed": [{"changed": 3}],
        4: 5,
    }
    page = page_of(tmp_path / "odd", yaml.safe_dump({"provenance": odd}))
    assert "an unknown number of parameters" in page
    for number, content in enumerate(("provenance: 3", "[1]", "")):
        assert 'id="provenance"' not in page_of(tmp_path / f"none{number}", content)
    assert read_run_file(tmp_path / "nowhere", []) == ({}, {})
