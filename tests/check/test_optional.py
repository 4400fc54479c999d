"""The check finds what would keep a run from starting: it looks at the run that is meant."""

import importlib.util
import json

import pytest
from bad_pairs import conversations, copy_of
from test_checks import MESSAGES, assert_says, setup_for, template

from topd.check import machine, optional, prompts, quality
from topd.cli.main import main
from topd.errors import TOPDError

PAIR = ("embedded:student-standard", "embedded:teacher")


def found(check, *options):
    return check(setup_for(*PAIR, *options))


def test_a_run_that_asks_for_nothing_has_no_such_rows():
    setup = setup_for()
    names = ("one_model", "libraries", "sampling", "evaluation", "benchmark", "adapters", "hub", "server")
    assert [getattr(optional, name)(setup) for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (["--use_vllm", "true"], "vllm"),
        (["--attn_implementation", "flash_attention_2"], "flash_attn"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--load_in_4bit", "true"], "bitsandbytes"),
        (["--use_liger_kernel", "true"], "liger_kernel"),
        (["--report_to", "tensorboard", "wandb"], "wandb"),
        (["--teacher_model_init_kwargs", '{"attn_implementation": "flash_attention_2"}'], "flash_attn"),
    ],
)
def test_missing_packages_are_named_with_the_option_that_needs_them(options, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    finding = found(optional.libraries, *options)
    assert finding.verdict == "error"
    assert_says(finding, rf"not installed: {package} \(", rf"pip install {package.replace('_', '-')}")


def test_packages_that_are_there_are_ok():
    assert found(optional.libraries, "--use_peft", "true").verdict == "ok"
    assert found(optional.libraries, "--report_to", "tensorboard") is None


@pytest.mark.parametrize("options", [["--top_p", "0"], ["--max_completion_length", "0"]], ids=" ".join)
def test_what_cannot_be_sampled_is_an_error(options):
    finding = found(optional.sampling, *options)
    assert finding.verdict == "error"
    assert options[0].removeprefix("--") in finding.found


def test_evaluation_without_data_and_data_without_evaluation(tmp_path):
    with pytest.raises(TOPDError, match=r"nope\.jsonl.*no such file"):
        found(optional.evaluation, "--eval_data", str(tmp_path / "nope.jsonl"), "--eval_strategy", "steps")
    assert_says(found(optional.evaluation, "--eval_strategy", "steps"), "no prompts for it", "--eval_data")
    unused = found(optional.evaluation, "--eval_data", "embedded")
    assert unused.verdict == "warning"
    assert_says(unused, "eval_strategy is no", "--eval_strategy")
    good = found(optional.evaluation, "--eval_data", "embedded", "--data_limit", "50", "--eval_strategy", "steps")
    assert (good.verdict, good.found) == ("ok", "50 prompts, eval_strategy steps")


EVALUATED = ["--eval_strategy", "steps", "--eval_benchmark"]


def test_held_out_problems_that_cannot_be_used_or_are_trained_on(tmp_path):
    assert found(optional.evaluation, *EVALUATED, "embedded") is None
    good = found(
        optional.benchmark, *EVALUATED, "embedded", "--eval_benchmark_limit", "30", "--max_completion_length", "96"
    )
    assert (good.verdict, good.found) == ("ok", "embedded: 30 problems x 1, greedy, up to 96 tokens, 8 at once")
    file = tmp_path / "mine.jsonl"
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "what is 9×9?", "answer": "81"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "1+1?"}) + "\n")
    seen = found(optional.benchmark, *EVALUATED, f"mine={file}", "--data", str(train), "--max_completion_length", "20")
    assert seen.verdict == "warning"
    assert_says(seen, "1 of the problems are among the training prompts", "Remove them from --data")
    file.write_text(json.dumps({"problem": "1+1?"}) + "\n")
    for options, says in [
        ([str(file)], "eval_benchmark .*mine.jsonl: 1 of 1 problems have no `answer`"),
        ([str(tmp_path / "nope.jsonl")], "eval_benchmark .*nope.jsonl: .*no such file"),
        (["embedded", "--max_completion_length", "250"], "do not fit the model's context of 256"),
        (["embedded", "--load_best_model_at_end", "true", "--save_strategy", "steps"], "there is no eval_dataset"),
    ]:
        with pytest.raises(TOPDError, match=says):
            found(optional.benchmark, *EVALUATED, *options)


def test_adapters_that_match_nothing_or_the_head():
    options = ["--use_peft", "true", "--lora_target_modules"]
    finding = found(optional.adapters, *options, "c_attn")
    assert finding.verdict == "error"
    assert_says(finding, "c_attn.* not found", "lora_target_modules")
    assert_says(found(optional.adapters, *options, "q_proj", "lm_head"), "output head", "Leave lm_head out")
    good = found(optional.adapters, *options, "q_proj", "v_proj")
    assert good.verdict == "ok"
    assert good.found.startswith("on 8 layers") or "layers" in good.found


def test_a_push_without_network_or_token(monkeypatch):
    assert_says(found(optional.hub, "--push_to_hub", "true"), "HF_HUB_OFFLINE", "Unset")
    monkeypatch.setattr(optional.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(optional, "get_token", lambda: None)
    assert_says(found(optional.hub, "--push_to_hub", "true"), "without a token", "Log in")
    assert found(optional.hub, "--push_to_hub", "true", "--hub_token", "x").verdict == "ok"


def test_one_model_as_student_and_teacher():
    finding = optional.one_model(setup_for("embedded:teacher", "embedded:teacher"))
    assert finding.verdict == "error"
    assert_says(finding, "same model, embedded:teacher", "Use another teacher")


def test_a_folder_below_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert_says(found(machine.disk, "--output_dir", str(tmp_path / "file" / "run")), "cannot write to", "another")


def test_a_template_that_renders_to_nothing_is_an_error(tmp_path):
    student = template(copy_of("student-standard", tmp_path / "student"), MESSAGES.replace("m['content']", "''"))
    setup = setup_for(student, "embedded:teacher", "--data", conversations(tmp_path / "data.jsonl"))
    with pytest.raises(TOPDError, match="it writes nothing"):
        prompts.sample(setup)


def test_rollouts_that_are_all_cut_are_a_warning():
    from topd.loading.pair import load_pair

    student, teacher, _ = load_pair(*PAIR)
    setup = setup_for(*PAIR, "--max_completion_length", "5")
    cut = quality.rollout_figures(setup, student, teacher, 4, 5)
    assert cut.verdict == "warning"
    assert_says(cut, "every rollout is truncated; 4 rollouts.* 4 not ended after 5", "Raise --max_completion_length")
    setup.config.max_completion_length = 96
    short = quality.rollout_figures(setup, student, teacher, 4, 5)
    assert_says(short, "every rollout is truncated", "--max-new-tokens 96")


def test_the_command_finds_them_all_and_training_stops_on_them(tmp_path, capsys):
    words = [
        "--config",
        "recipe:embedded",
        "--model_name_or_path",
        PAIR[0],
        "--teacher_model_name_or_path",
        PAIR[1],
    ]
    words += ["--data", "embedded", "--use_vllm", "true", "--eval_strategy", "steps", "--output_dir"]
    words += [str(tmp_path / "run"), "--top_p", "0"]
    assert main(["check", *words, "--quick", "--json"]) == 2
    errors = {row["check"] for row in json.loads(capsys.readouterr().out)["findings"] if row["verdict"] == "error"}
    assert errors >= {"sampling", "evaluation"}
    assert ("libraries" in errors) == (importlib.util.find_spec("vllm") is None)
    assert main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert "evaluation: eval_strategy is steps, and there are no prompts" in told
