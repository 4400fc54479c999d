"""Files full of nonsense: options and data end in a message, never in a traceback."""

import contextlib
import dataclasses
import io
import math
import os
from typing import get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from loading.test_data import NAMES, ROWS, accept_or_explain, write
from trl import ModelConfig

from topd.cli.main import main
from topd.cli.train import DataArguments, parse
from topd.errors import TOPDError
from topd.loading.options import _fits
from topd.training.config import TOPDConfig

KINDS = (ModelConfig, TOPDConfig, DataArguments)
HINTS = {
    name: hint
    for kind in KINDS
    for name, hint in get_type_hints(kind).items()
    if name in {field.name for field in dataclasses.fields(kind)}
}
SAFE = {"use_cpu": True, "bf16": False, "report_to": "none"}
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["", "x", "true", "1e-4", "topd", "no", "auto", "{}", '{"a": 1}', "[", "\0", "é"])
    | st.text(max_size=6)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
OPTIONS = st.dictionaries(
    st.sampled_from([*HINTS, "env", "config", "help", "nonsense"]) | st.text(max_size=5) | st.integers(), VALUES,
    min_size=1, max_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def parse_or_explain(folder, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    before = os.environ.copy()
    said = ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(["--config", str(file)])
    except TOPDError as error:
        said = str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert len(said) < 2000
    assert said.encode("utf-8") is not None  # it can be printed


def options_or_explain(folder, options) -> None:
    here = {"output_dir": str(folder / "run"), **SAFE}
    parse_or_explain(folder, yaml.safe_dump(here | options, allow_unicode=True).encode("utf-8", "surrogatepass"))


@settings(max_examples=50)
@given(options=OPTIONS)
def test_options(folder, options):
    options_or_explain(folder, options)


@settings(max_examples=40)
@given(
    content=st.binary(max_size=40) | st.text(st.sampled_from("aé:-[]{}\"'#&*!|>%@ \n\t0"), max_size=30).map(str.encode)
)
def test_files_that_are_no_yaml(folder, content):
    parse_or_explain(folder, content)


@pytest.mark.slow
@settings(max_examples=2000)
@given(options=OPTIONS)
def test_thousands_of_options(folder, options):
    options_or_explain(folder, options)


@pytest.mark.slow
@settings(max_examples=3000)
@given(name=st.sampled_from(NAMES[:3]), rows=ROWS)
def test_thousands_of_rows(folder, name, rows):
    accept_or_explain(write(folder, name, rows))


@pytest.mark.slow
@settings(max_examples=3000)
@given(name=st.sampled_from(NAMES), data=st.binary(max_size=300))
def test_thousands_of_random_files(folder, name, data):
    accept_or_explain(write(folder, name, data))


HARMFUL = {"data", "dataloader_num_workers", "dataloader_prefetch_factor", "eval_data", "log_level", "push_to_hub"}
HARMFUL |= {"teacher_model_server_url", "use_vllm"}
"""They may start thousands of processes, or talk to the network."""
TINY = {
    "model_name_or_path": "embedded:student-standard", "teacher_model_name_or_path": "embedded:teacher", "max_steps": 1,
    "per_device_train_batch_size": 2, "max_completion_length": 6, "window_length": 3, "data_limit": 8,
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


ODD = [None, True, False, 0, 1, -1, 3, 1000, 10**12, 0.5, 1.5, -2.0, math.nan, math.inf, "x", "", "true", [], ["a"], {},
       {"a": 1}]  # fmt: skip
FITTING = [
    (name, value)
    for name in sorted(set(HINTS) - HARMFUL - set(TINY) - set(SAFE))
    for value in ODD
    if _fits(value, HINTS[name])
]
"""Of the right kind, so that they get further than the parser."""


@pytest.mark.slow
@settings(max_examples=60)
@given(option=st.sampled_from(FITTING))
def test_whole_runs_with_one_odd_option(folder, option):
    name, value = option
    file = folder / "config.yaml"
    options = {"output_dir": str(folder / "run"), **SAFE, **TINY, name: value}
    file.write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    before = os.environ.copy()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            assert main(["train", "--config", str(file)]) in (0, 2)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert "Traceback" not in said.getvalue()
