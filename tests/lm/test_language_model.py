"""The language-model pair by name, with a tiny base instead of the 135 M one; its data; the two wordings."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import TOKENIZER
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from topd.cli.correct import is_right_on
from topd.cli.options import data_source
from topd.cli.probe import EMBEDDED_DEFAULTS
from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.evaluation.benchmarks import load_benchmark
from topd.lm import build, pair
from topd.lm.build import Recipe, Stage, drilled
from topd.lm.task import equation, paraphrase, simple, stepwise
from topd.loading.data import load_prompts

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def tiny_base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_pair(tmp_path, monkeypatch):
    """The student's adapter of a tiny base, and how often the base was written; cached under `tmp_path`."""
    written = []

    def write_base(folder: Path) -> None:
        written.append(folder)
        tiny_base().save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)

    monkeypatch.setattr(pair, "write_base", write_base)
    monkeypatch.setattr(pair, "_HERE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    adapted = get_peft_model(
        tiny_base(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapters" / "student")
    return adapted, written


def test_a_name_is_the_base_with_its_adapter_merged_built_once(tiny_pair):
    adapted, written = tiny_pair
    folder = resolve_model("lm:student")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-5, rtol=1e-4)
    assert (merged(IDS).logits - tiny_base()(IDS).logits).abs().max() > 0.01
    assert resolve_model("lm:student") == folder
    assert len(written) == 1


def test_the_warm_student_is_the_student_with_another_adapter(tiny_pair, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(resolve_model("lm:student"))
    warmed = get_peft_model(student, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    warmed.save_pretrained(tmp_path / "adapters" / "warm-student")
    merged = AutoModelForCausalLM.from_pretrained(resolve_model("lm:warm-student"))
    torch.testing.assert_close(merged(IDS).logits, warmed(IDS).logits, atol=1e-5, rtol=1e-4)
    with warmed.disable_adapter():
        assert (merged(IDS).logits - warmed(IDS).logits).abs().max() > 0.01


def test_an_interrupted_build_is_built_again(tiny_pair, monkeypatch):
    def interrupted(base: Path, adapter: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pair, "write_merged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("lm:student")
    AutoModelForCausalLM.from_pretrained(resolve_model("lm:student"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm:nobody", "Known: lm:base, lm:student, lm:teacher, lm:warm-student"),
        ("lm:teacher", "in the repository, not in the wheel"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_why(tiny_pair, name, message):
    with pytest.raises(TOPDError, match=message):
        resolve_model(name)


def test_the_data_go_with_the_models_and_have_answers():
    assert data_source(None, "lm:student", "lm:teacher") == "lm"
    rows = load_prompts("lm")
    assert len(rows) == 3000
    assert rows[0]["prompt"][0]["role"] == "user"
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", answer) for answer in rows["answer"])
    assert [len(load_benchmark(f"lm-{name}").problems) for name in ("held-out", "unseen", "tuning")] == [500, 500, 300]


@pytest.mark.parametrize("name", pair.DATA)
def test_all_data_of_the_pair_are_judged_and_measured_as_its_prompts_are(name):
    is_right = is_right_on(name, [{"answer": "21"}])
    assert is_right(0, "14 + 7 = 21\n#### 21")
    assert not is_right(0, "14 + 7 = 21\n#### 22")
    assert EMBEDDED_DEFAULTS[name] == EMBEDDED_DEFAULTS["lm"]


def test_no_problem_is_in_two_files():
    asked = [
        json.loads(line)["prompt"][0]["content"]
        for name in pair.DATA
        for line in Path(pair.data_file(name)).read_text().splitlines()
    ]
    assert len(set(asked)) == len(asked) == 4300


SOLUTION = """The ride of the slide takes 385 meters / 55 meters/minute = 7 minutes
So the second takes 7 * 2 = 14 minutes.
Therefore, she needs 14 + 7 = 21 minutes.
#### 21"""


def test_the_student_s_wording_keeps_the_steps_and_the_answer():
    written = {paraphrase(SOLUTION, random.Random(seed)) for seed in range(20)}
    assert len(written) == 20
    for text in written:
        assert re.findall(r"\d+", text)[:-2] == re.findall(r"\d+", SOLUTION)[:-1]  # the closing sentence says it again
        assert text.endswith("#### 21")
        assert not re.search(r"\b(So|Therefore), the second|Therefore", text)
    assert any("7 times 2" in text for text in written)
    assert any("7 * 2 = 14" in text for text in written)


def test_equations_of_the_drill_are_right_and_only_results_are_learned():
    rng = random.Random(0)
    for _ in range(300):
        left, result = (re.sub("[£€$ ]", "", text) for text in equation(rng))
        assert left.endswith("=")
        assert eval(left[:-1].replace("x", "*")) == int(result) <= 160
    ids, learned = drilled(TOKENIZER, random.Random(1), Stage("drill", 16).shares, equations=2)
    taught = TOKENIZER.decode([token for token, each in zip(ids, learned, strict=True) if each])
    rng = random.Random(1)
    assert re.findall(r"\d+", taught) == [re.search(r"\d+", equation(rng)[1])[0] for _ in range(2)]


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("They ate 3 + 8 + 11 = 22 slices.", "They ate 3 + 8 = 11 + 11 = 22 slices."),
        ("There are 31-4-8 = 19 bricks.", "There are 31-4 = 27-8 = 19 bricks."),
        ("She spent €23 + €27 + €22 + €9 = €81.", "She spent €23 + €27 = €50 + €22 = €72 + €9 = €81."),
        ("He has 2 + 3 = 5 and 4 * 2 = 8.", "He has 2 + 3 = 5 and 4 * 2 = 8."),
    ],
)
def test_long_sums_are_written_in_steps(written, steps):
    assert stepwise(written) == steps


def test_a_stage_may_end_before_its_learning_rate_falls():
    rates = Recipe((Stage("wide", 1600, steps=50), Stage("simple", 320)), learning_rate=1.0).rates()
    assert len(rates) == 50 + 20
    assert rates[:3] == [0.05, 0.1, pytest.approx(0.15)]
    assert rates[49] == 1.0
    assert rates[50] == 0.05
    assert rates[-1] == 0.2


def test_a_build_that_was_killed_while_it_saved_continues_as_if_it_had_not_been(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(build, "model_folder", lambda role: tmp_path / role)
    monkeypatch.setitem(build.RECIPES, "student", Recipe((Stage("drill", 42),), rank=2, batch=1))
    build.train("student", tmp_path / "whole")
    save, saved = torch.save, []

    def killed(state, file):
        saved.append(state["step"])
        save(state, file)
        if len(saved) == 2:
            Path(file).write_bytes(Path(file).read_bytes()[:1000])
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            build.train("student", tmp_path / "killed")
    assert saved == [20, 40]
    build.train("student", tmp_path / "killed")
    logged = (tmp_path / "killed" / "student" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 43))
    whole, resumed = (
        (tmp_path / run / "student" / "shipped" / "adapter_model.safetensors").read_bytes()
        for run in ("whole", "killed")
    )
    assert whole == resumed


def test_problems_have_numbers_up_to_a_hundred():
    numbers = [float(row) for name in ("held-out", "unseen") for row in answers_of(f"lm-{name}")]
    assert max(numbers) <= 100
    assert simple("He pays 20 * $4.50 = $90.")
    assert not simple("He pays 20 * $4.505 = $90.10.")
    assert not simple("The town has 1,200 houses.")


def answers_of(name):
    return [problem.answer for problem in load_benchmark(name).problems]


@pytest.mark.slow
def test_the_files_are_what_the_build_writes_and_hold_no_problem_that_was_drawn_for_training(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    build.write_data(tmp_path)
    for name, split in pair.DATA.items():
        assert (tmp_path / f"{split}.jsonl").read_bytes() == Path(pair.data_file(name)).read_bytes()
    asked = {
        json.loads(line)["prompt"][0]["content"]
        for file in tmp_path.iterdir()
        for line in file.read_text().splitlines()
    }
    monkeypatch.setattr(build, "solved", lambda problem, *others: problem.question)
    monkeypatch.setattr(build, "drilled", lambda *given: None)
    drawn = [
        question
        for name, recipe in build.RECIPES.items()
        for stage in build.rows(name, None, recipe)
        for question in stage
        if question is not None
    ]
    assert len(drawn) == 2816 + 3840 + 768 + 640 + 640 + 640 + 640 + 320
    assert not asked & set(drawn)
