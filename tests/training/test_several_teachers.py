"""MOPD: each row of the dataset learns from the teacher that it names."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import prompts, tiny_config, tiny_model, tiny_trainer

from topd.cli.main import main
from topd.errors import TOPDError
from topd.report.records import load_run
from topd.training import several_teachers
from topd.training.several_teachers import MOPDTrainer


def routed(names):
    return Dataset.from_list([{**row, "teacher": names[i % len(names)]} for i, row in enumerate(prompts(16))])


def teachers():
    return {"a": tiny_model(1, width=96), "b": tiny_model(2, width=64)}


def trained(out, trainer_type=None, **options):
    trainer = tiny_trainer(out, trainer_type or MOPDTrainer, max_steps=1, optim="sgd", **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


METHODS = [
    {"method": "topd"},
    {"method": "topd", "student_window": "rollout"},
    {"method": "topd", "guidance_context": "teacher"},
    {"method": "opd-capped"},
    {"method": "opd", "opd_loss": "one_pass"},
    {"embedding": "teacher_hidden"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_where_every_row_names_one_teacher_it_is_that_teacher_alone(tmp_path, options):
    from topd.training import TOPDTrainer

    alone = trained(tmp_path / "alone", TOPDTrainer, teacher=teachers()["b"], dataset=routed("b"), **options)
    among = trained(tmp_path / "among", teacher=teachers(), dataset=routed("b"), **options)
    assert [float(loss) for loss in among[0]] == pytest.approx([float(loss) for loss in alone[0]], rel=1e-4)
    torch.testing.assert_close(among[1], alone[1], rtol=1e-3, atol=1e-5)


def test_the_names_decide(tmp_path):
    mixed = trained(tmp_path / "mixed", teacher=teachers(), dataset=routed("ab"))
    swapped = trained(tmp_path / "swapped", teacher=teachers(), dataset=routed("ba"))
    assert not torch.allclose(mixed[1], swapped[1], rtol=1e-3, atol=1e-5)
    assert torch.isfinite(mixed[1]).all()


def test_the_audit_and_the_report_name_the_teacher_of_each_rollout(tmp_path):
    trained(tmp_path, teacher=teachers(), dataset=routed("ab"), audit_steps=1)
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    by_prompt = {row["prompt"]: row["teacher"] for row in routed("ab")}
    assert {record["teacher"] for record in records} == {"a", "b"}
    assert all(record["teacher"] == by_prompt[record["prompt"]] for record in records)
    (arm,) = load_run(tmp_path).arms
    assert {rollout.heading for rollout in arm.rollouts} == {"Step 1, teacher a", "Step 1, teacher b"}


def test_the_column_may_have_the_name_of_trl_s_pull_request(tmp_path):
    dataset = routed("ab").rename_column("teacher", "teacher_id")
    trainer = tiny_trainer(tmp_path, MOPDTrainer, teacher=teachers(), dataset=dataset)
    assert trainer.train_dataset["teacher"][:] == ["a", "b"] * 8


def test_a_name_without_a_teacher_is_said_before_any_step(tmp_path):
    with pytest.raises(TOPDError, match=r"names c; the teachers are: a, b"):
        tiny_trainer(tmp_path, MOPDTrainer, teacher=teachers(), dataset=routed("abc"))
    with pytest.raises(TOPDError, match=r"has no column 'teacher'.*Its columns are: prompt"):
        tiny_trainer(tmp_path, MOPDTrainer, teacher=teachers(), dataset=prompts(4))


def test_in_a_stream_a_name_without_a_teacher_is_said_when_it_comes(tmp_path):
    stream = routed("abc").to_iterable_dataset()
    with pytest.raises(TOPDError, match=r"names c; the teachers are: a, b"):
        trained(tmp_path, teacher=teachers(), dataset=stream)


def test_a_name_without_a_teacher_that_another_process_meets_ends_this_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(several_teachers, "gather_object", lambda names: [*names, "c"])
    with pytest.raises(TOPDError, match=r"names c; the teachers are: a, b"):
        trained(tmp_path, teacher=teachers(), dataset=routed("ab").to_iterable_dataset())


def test_removing_unused_columns_leaves_the_teacher_s_name(tmp_path):
    kept = trained(tmp_path, teacher=teachers(), dataset=routed("ab"))
    dataset = routed("ab").add_column("note", ["unused"] * 16)
    removed = trained(tmp_path, teacher=teachers(), dataset=dataset, remove_unused_columns=True)
    assert torch.equal(kept[1], removed[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "opd", "opd_loss": "trl"}, "one_pass"),
        ({"max_overhead": 0.5}, "not supported with several teachers yet"),
        ({"teacher_model_server_url": "http://127.0.0.1:1"}, "pass the weights of all teachers"),
    ],
)
def test_what_works_with_one_teacher_only_is_said(tmp_path, options, message):
    with pytest.raises(TOPDError, match=message):
        MOPDTrainer(tiny_model(0), teachers(), tiny_config(tmp_path, **options), routed("ab"))


def test_an_early_end_of_rollouts_is_refused_however_the_teachers_are_given(tmp_path):
    options = {"method": "opd", "max_informative_tokens": 3}
    with pytest.raises(TOPDError, match="the weights of one teacher"):
        tiny_trainer(tmp_path, MOPDTrainer, teacher=teachers(), dataset=routed("ab"), **options)


def test_an_evaluation_set_is_refused_wherever_it_is_given(tmp_path):
    args = tiny_config(tmp_path)
    with pytest.raises(TOPDError, match="eval_dataset"):
        MOPDTrainer(tiny_model(0), teachers(), args, routed("ab"), routed("ab"))
    with pytest.raises(TOPDError, match="eval_dataset"):
        MOPDTrainer(tiny_model(0), teachers(), args, train_dataset=routed("ab"), eval_dataset=routed("ab"))


def test_the_trainer_with_one_teacher_does_not_ignore_the_option(tmp_path):
    from topd.training import TOPDTrainer

    args = tiny_config(tmp_path, teachers={"a": "embedded:teacher"})
    with pytest.raises(TOPDError, match="needs MOPDTrainer"):
        TOPDTrainer(tiny_model(0), tiny_model(1), args, prompts(4))


def test_no_teacher_at_all_is_said(tmp_path):
    with pytest.raises(TOPDError, match="at least one teacher"):
        MOPDTrainer(tiny_model(0), {}, tiny_config(tmp_path), routed("ab"))


def test_the_command_takes_teachers_from_a_recipe_and_names_from_the_data(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what is {a}+{b}×2?", "teacher": "ab"[a % 2]} for a in range(1, 5) for b in (3, 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teachers: {a: 'embedded:teacher', b: 'embedded:student-easy'}\n")
    common = [
        "train", "--config", str(recipe), "--model_name_or_path", "embedded:student-standard", "--output_dir",
        str(tmp_path / "run"), "--per_device_train_batch_size", "4", "--max_completion_length", "24", "--use_cpu",
        "true", "--bf16", "false", "--max_steps", "1", "--window_length", "4", "--report_to", "none",
    ]  # fmt: skip
    assert main([*common, "--data", str(data)]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main([*common, "--data", "embedded"]) == 2
    assert "no column teacher" in capsys.readouterr().err
    data.write_text('{"prompt": "what is 1+2?", "teacher": "c"}\n' * 4)
    assert main([*common, "--data", str(data), "--output_dir", str(tmp_path / "other")]) == 2
    assert "names c; the teachers are: a, b" in capsys.readouterr().err
    data.write_text('{"prompt": "what is 1+2?"}\n')
    assert main([*common, "--data", str(data)]) == 2
    assert "the teacher is None; write text" in capsys.readouterr().err
