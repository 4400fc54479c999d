"""`TOPDConfig` refuses values of the wrong kind."""

import re

import numpy
import pytest
import yaml
from tiny import tiny_config

from topd.training.config import TOPDConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_length": "50"}, "window_length is '50'; write a whole number"),
        ({"window_length": 5.5}, "window_length is 5.5"),
        ({"candidate_share": "a"}, "candidate_share is 'a'; write a number"),
        ({"audit_steps": None}, "audit_steps is None; write a whole number"),
        ({"window_length": "5e1"}, "window_length is '5e1'; write a whole number"),
        ({"method": 3}, "method is 3; write opd"),
        ({"max_steps": True}, "max_steps is True"),
        ({"shuffle_dataset": "no"}, "shuffle_dataset is 'no'; write true or false"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_python_too(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(tmp_path, **options)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert yaml.safe_load("2e-6") == "2e-6"
    assert tiny_config(tmp_path, learning_rate="2e-6").learning_rate == 2e-6


def test_numbers_of_numpy_and_paths_are_taken(tmp_path):
    given = tiny_config(tmp_path, window_length=numpy.int64(3), learning_rate=numpy.float32(0.5))
    assert (given.window_length, given.learning_rate) == (3, 0.5)
    assert TOPDConfig(tmp_path, use_cpu=True, bf16=False).output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of gradient_accumulation_steps"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"prefix_weight_max": 4.0}, "does nothing with one update"),
        ({"prefix_weight_max": 0.5, "num_iterations": 2}, "must be at least 1"),
        ({"prefix_weight_max": 4.0, "num_iterations": 2, "method": "opd", "opd_loss": "trl"}, "TOPD's own loss"),
        ({"max_completion_length_start": 4}, "give both"),
        ({"max_completion_length_start": 21, "max_completion_length_steps": 4}, "from 1 to max_completion_length"),
        ({"max_completion_length_start": 4, "max_completion_length_steps": 0}, "must be at least 1"),
        ({"max_informative_tokens": 0}, "must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"torch_compile_backend": "eager"}, "torch_compile does nothing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **options)
