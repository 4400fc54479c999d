"""Every recipe is what it says: parsed by the real parsers, with the paper's values, and commands that exist."""

import itertools
import re
import shlex

import pytest
import yaml
from documents import assert_parses, commands_of

from topd.cli.launch import is_launch_option
from topd.cli.main import parser
from topd.cli.recipes import config_file, recipes
from topd.cli.train import parse
from topd.cli.warmstart import parse as parse_warmstart

RECIPES = list(recipes().values())
WARMSTART = [path for path in RECIPES if path.stem.endswith("-warmstart")]
PAPER_PAIR = [path for path in RECIPES if path.stem.startswith("qwen3-4b-from-30b")]


def parsed(path):
    command = parse_warmstart if path in WARMSTART else parse
    return command(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


def launch_lines(path):
    """Commands of the header, without the machines that they run on."""
    for line in path.read_text().splitlines():
        found = re.search(r"^#.*?((?:\w+=\S+ )*(?:topd|trl|vllm) .*)$", line)
        if found and "--" in found[1]:
            yield re.sub(r"^(?:\w+=\S+ )+", "", found[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_parsed_by_the_real_classes(path):
    data, config, model = parsed(path)
    assert model.model_name_or_path
    assert config.teacher_model_name_or_path or config.teachers
    assert data.data
    if path in WARMSTART:
        assert config.kd_ratio == 0.5
    else:
        assert config.method == "topd"


def test_the_paper_s_pair_has_the_paper_s_values():
    """Appendix B.1."""
    (_, first, _), (_, second, _) = (parsed(path) for path in PAPER_PAIR)
    accumulated = first.gradient_accumulation_steps * first.per_device_train_batch_size
    assert (first.kd_ratio, first.learning_rate, first.max_length, first.num_train_epochs) == (0.5, 2e-5, 16384, 1)
    assert (first.warmup_steps, first.packing, 4 * accumulated) == (0.05, True, 128)
    assert (second.learning_rate, second.warmup_steps, second.max_grad_norm) == (2e-6, 0.05, 1.0)
    assert (second.temperature, second.top_p, second.max_completion_length, second.beta) == (1.0, 1.0, 8000, 1.0)
    assert (second.window_length, second.candidate_share, second.student_window) == (50, 0.0225, "rollout")
    assert 2 * second.gradient_accumulation_steps * second.per_device_train_batch_size == 4


@pytest.mark.parametrize("path", PAPER_PAIR, ids=lambda path: path.stem)
def test_every_value_of_the_paper_s_pair_says_where_it_is_from(path):
    free = {"output_dir", "dtype", "method", "audit_steps", "logging_steps"}  # ours by their nature
    for line in path.read_text().splitlines():
        option = line.split(":")[0]
        if line and not line.startswith("#") and option not in free:
            assert re.search(r"# .*(paper|our choice)", line), line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_launch_lines_name_files_and_options_that_are_there(path):
    lines = list(launch_lines(path))
    assert any(f"recipe:{path.stem}" in line.split() for line in lines)
    for line in lines:
        words = shlex.split(line)
        for option, file in itertools.pairwise(words):
            if option == "--config":
                assert config_file(file).is_file(), line
        for command in commands_of(line):
            assert_parses(command)
        if words[:2] == ["topd", "generate"]:
            assert parser().parse_args(words[1:]).out.suffix in (".jsonl", ".parquet")


def test_launch_lines_use_fsdp2_where_a_model_is_sharded():
    """The launcher's options of the recipes for several GPUs are options of accelerate."""
    lines = [line for path in RECIPES for line in launch_lines(path) if "--accelerate_config fsdp2" in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        options = [word[2:] for word in words[words.index("--accelerate_config") :] if word.startswith("--")]
        assert [name for name in options if not is_launch_option(name, ())] == []


def test_both_stages_of_a_pair_fit_together():
    for path in WARMSTART:
        second = path.with_name(path.name.replace("-warmstart", ""))
        first, then = (yaml.safe_load(file.read_text()) for file in (path, second))
        assert first["teacher_model_name_or_path"] == then["teacher_model_name_or_path"]
        optional = {"embedded-warmstart": "runs/embedded-warm", "lm-warmstart": "runs/lm-warm"}
        assert first["output_dir"] == optional.get(path.stem, then["model_name_or_path"])
