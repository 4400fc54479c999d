"""The teacher's own prompt: it reads and continues the student's response behind it; the student's prompt stays."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from teachers.fake_server import serving
from tiny import TOKENIZER, prompts, tiny_model, tiny_trainer

from topd.embedded.task import make_problems
from topd.errors import ContextError, DataError, TOPDError
from topd.near_future import Branches, DistilledModel, LocalModel, Places, Rollouts
from topd.near_future.model_parts import left_padded
from topd.near_future.sampling import sample_rollouts
from topd.teachers.openai_server import OpenAIServer
from topd.teachers.routed import RoutedTeacher
from topd.teachers.server_windows import connect
from topd.teachers.top_k import TopKTeacher
from topd.training import TOPDTrainer
from topd.training.method import Method
from topd.training.several_teachers import MOPDTrainer
from topd.training.step import Pair, look_ahead, near_future_transport

EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
LENGTH = 5
CONTEXTS = ["", "first 2+3=5. ", "what is 1+2×3? first 2×3=6, leaving 1+6. ", "3+4? "]
"""Before the problem, in the teacher's prompts: of different lengths."""


def problems(n=4):
    return [problem.prompt for problem in make_problems(n, 0, held_out=False)]


def ids(text):
    return torch.tensor(TOKENIZER(text)["input_ids"])


def rollouts_with_contexts(student):
    asked = problems()
    rollouts = sample_rollouts(student, TOKENIZER, asked, max_new_tokens=12)
    own = left_padded([ids(before + prompt) for before, prompt in zip(CONTEXTS, asked, strict=True)], PAD)
    return replace(rollouts, teacher_prompt_ids=own[0], teacher_prompt_mask=own[1])


def local(model):
    return DistilledModel(model, LocalModel(model, PAD, [EOS]))


STUDENT, TEACHERS = tiny_model(9), [tiny_model(1, width=96), tiny_model(2, width=32)]


@pytest.fixture(scope="module")
def teachers():
    with serving(TEACHERS[0], TOKENIZER) as fake:
        server = connect(OpenAIServer(fake.url), TOKENIZER, [EOS], vocabulary=len(TOKENIZER))
        yield {
            "local": local(TEACHERS[0]),
            "windows from a server": DistilledModel(TEACHERS[0], server, share_prefix=False),
            "routed": RoutedTeacher([local(model) for model in TEACHERS]),
            "top-k": TopKTeacher(server, known=len(TOKENIZER)),
        }


@pytest.mark.parametrize("kind", ["local", "windows from a server", "routed", "top-k"])
def test_scores_and_windows_are_those_of_the_teacher_alone_on_its_prompt_and_the_response(teachers, kind):
    """Against one forward pass and one `generate` per sequence [teacher's prompt + response prefix]."""
    torch.manual_seed(0)
    rollouts = rollouts_with_contexts(STUDENT)
    number = torch.tensor([0, 1, 1, 0]) if kind == "routed" else torch.zeros(4, dtype=torch.long)
    rollouts, student = replace(rollouts, teacher=number), local(STUDENT)
    method = Method(window_length=LENGTH, candidate_share=0.3, fork_rule="threshold", fork_threshold=0.1)
    found = look_ahead(rollouts, student, teachers[kind], method)
    places, windows = found.candidates.places, found.candidates.theirs
    assert len(places) >= 8
    assert torch.equal(places.rollouts.prompt_ids, rollouts.prompt_ids)
    asked = problems()
    for row in range(4):
        teacher, size = TEACHERS[number[row]], int(rollouts.response_mask[row].sum())
        response = rollouts.response_ids[row, :size]
        theirs = torch.cat([ids(CONTEXTS[row] + asked[row]), response])
        ours = torch.cat([ids(asked[row]), response])
        log_p = [
            model(sequence[None]).logits[0, -size - 1 : -1].float().log_softmax(-1)
            for model, sequence in ((STUDENT, ours), (teacher, theirs))
        ]
        expected = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)
        torch.testing.assert_close(found.look.token_loss[row, :size], expected, rtol=1e-3, atol=1e-4)
        for index in (places.rows == row).nonzero().flatten().tolist():
            prefix = theirs[: len(theirs) - size + int(places.positions[index])]
            alone = LocalModel(teacher, PAD, [EOS]).continue_([prefix], LENGTH)
            assert torch.equal(windows.tokens[index] * windows.mask[index], alone.tokens[0] * alone.mask[0])


def test_states_in_windows_and_ground_costs_are_read_behind_the_teacher_s_prompt():
    torch.manual_seed(0)
    rollouts, teacher = rollouts_with_contexts(STUDENT), local(TEACHERS[0])
    tokens = torch.full((4, 1, LENGTH), 5)
    branches = Branches(torch.full((4, 1), 2), tokens, torch.ones_like(tokens, dtype=torch.bool))
    states = teacher.hidden_in_windows(rollouts.as_teacher_reads, branches)
    for row, (before, prompt) in enumerate(zip(CONTEXTS, problems(), strict=True)):
        sequence = torch.cat([ids(before + prompt), rollouts.response_ids[row, :2], tokens[row, 0]])
        alone = TEACHERS[0].model(sequence[None]).last_hidden_state[0, -LENGTH - 1 : -1]
        torch.testing.assert_close(states[row, 0], alone, rtol=1e-3, atol=1e-3)
    places = Places(rollouts, torch.arange(4), torch.full((4,), 2))
    plain = replace(places, rollouts=replace(rollouts, teacher_prompt_ids=None, teacher_prompt_mask=None))
    ours, theirs = (teacher.continue_(each, LENGTH) for each in (plain, places.as_teacher_reads))
    found, expected, other = (
        near_future_transport(
            each, ours, theirs, Pair(local(STUDENT), teacher), Method(embedding="teacher_hidden")
        ).distance
        for each in (places, places.as_teacher_reads, plain)
    )
    assert torch.equal(found, expected)
    assert not torch.allclose(found, other)


def test_waves_count_the_longer_of_both_prompts():
    torch.manual_seed(0)
    rollouts = rollouts_with_contexts(STUDENT)
    assert rollouts.width == rollouts.teacher_prompt_ids.shape[1] + rollouts.response_ids.shape[1]
    part = Rollouts.cat([rollouts[:1], rollouts[torch.tensor([2, 3])]])
    assert torch.equal(part.as_teacher_reads.prompt_ids, rollouts.teacher_prompt_ids[[0, 2, 3]])
    plain = replace(rollouts, teacher_prompt_ids=None, teacher_prompt_mask=None)
    assert plain.as_teacher_reads is plain


# Training


def trained(out, trainer_type=TOPDTrainer, dataset=None, max_steps=1, **options):
    trainer = tiny_trainer(out, trainer_type, dataset, max_steps=max_steps, optim="sgd", **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def with_column(before, n=16):
    return Dataset.from_list([{**row, "teacher_prompt": before + row["prompt"]} for row in prompts(n)])


METHODS = [
    {"method": "topd", "gradient_accumulation_steps": 2},
    {"method": "topd", "guidance_context": "teacher", "student_window": "regenerated"},
    {"method": "opd"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_student_s_prompt_as_the_teacher_s_changes_nothing_and_another_does(tmp_path, options):
    plain = trained(tmp_path / "plain", dataset=prompts(16), **options)
    same = trained(tmp_path / "same", dataset=with_column(""), **options)
    other = trained(tmp_path / "other", dataset=with_column(CONTEXTS[2]), **options)
    assert same[0] == plain[0]
    assert torch.equal(same[1], plain[1])
    assert abs(other[0][0] - plain[0][0]) > 1e-3


def test_the_loss_of_a_step_of_opd_and_of_the_evaluation_is_the_kl_between_both_prompts(tmp_path):
    dataset = with_column(CONTEXTS[2], 4)
    trainer = tiny_trainer(
        tmp_path, dataset=dataset, method="opd", trainer_options={"eval_dataset": dataset},
        generation_kwargs={"do_sample": False}, eval_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    student, teacher = trainer.model, trainer.teacher_model
    losses = []
    for training in (True, False):
        trainer.model.train(training)
        batch = trainer._generate_and_score_completions(list(dataset))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    mask = batch["completion_mask"].bool()
    sizes, total = mask.sum(1).tolist(), 0.0
    with torch.no_grad():
        for row, size in enumerate(sizes):
            response = batch["completion_ids"][row, :size]
            log_p = [
                model.eval()(torch.cat([ids(text), response])[None]).logits[0, -size - 1 : -1].float().log_softmax(-1)
                for model, text in ((student, dataset[row]["prompt"]), (teacher, dataset[row]["teacher_prompt"]))
            ]
            total += float((log_p[0].exp() * (log_p[0] - log_p[1])).sum())
    assert losses == pytest.approx([total / sum(sizes)] * 2, rel=1e-3)


def test_several_teachers_read_their_own_prompts(tmp_path):
    def rows(before):
        return with_column(before).add_column("teacher", ["a", "b"] * 8)

    teachers = {"a": tiny_model(1, width=96), "b": tiny_model(2)}
    plain = trained(tmp_path / "plain", MOPDTrainer, rows("").remove_columns("teacher_prompt"), teacher=teachers)
    same = trained(tmp_path / "same", MOPDTrainer, rows(""), teacher=teachers)
    other = trained(tmp_path / "other", MOPDTrainer, rows(CONTEXTS[2]), teacher=teachers)
    assert same[0] == plain[0]
    assert torch.equal(same[1], plain[1])
    assert abs(other[0][0] - plain[0][0]) > 1e-3


def chat():
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(8)])


def test_a_system_turn_for_the_teacher_is_part_of_its_prompt_only(tmp_path):
    trainer = tiny_trainer(tmp_path, dataset=chat(), teacher_system_prompt="first 2+3=5. ", method="opd")
    batch = trainer._generate_and_score_completions([chat()[row] for row in range(4)])
    for row in range(4):
        asked = chat()[row]["prompt"][0]["content"]
        for name, text in (("prompt", asked), ("teacher_prompt", f"first 2+3=5. {asked}")):
            assert batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist() == ids(text).tolist()


def test_a_system_turn_replaces_the_one_of_the_teacher_s_own_messages(tmp_path):
    rows = [
        {**row, "teacher_prompt": [{"role": "system", "content": "no "}, *row["prompt"], *row["prompt"]]}
        for row in chat()
    ]
    trainer = tiny_trainer(tmp_path, dataset=Dataset.from_list(rows), teacher_system_prompt="so ", method="opd")
    read = trainer._teacher_prompt_ids(rows[:1])[0]
    asked = rows[0]["prompt"][0]["content"]
    assert read == ids(f"so {asked}{asked}").tolist()


def test_arguments_of_the_template_for_the_teacher(tmp_path):
    import copy

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% if hint %}{{ hint }}{% endif %}{{ messages[0]['content'] }}"
    trainer = tiny_trainer(
        tmp_path, dataset=chat(), tokenizer=tokenizer, method="opd", teacher_chat_template_kwargs={"hint": "3+4? "}
    )
    batch = trainer._generate_and_score_completions([chat()[0]])
    asked = chat()[0]["prompt"][0]["content"]
    assert batch["prompt_ids"][0].tolist() == ids(asked).tolist()
    assert batch["teacher_prompt_ids"][0].tolist() == ids(f"3+4? {asked}").tolist()


def test_removing_unused_columns_leaves_the_teacher_s_prompt(tmp_path):
    dataset = with_column("first ").add_column("note", ["unused"] * 16)
    trainer = tiny_trainer(tmp_path, dataset=dataset, remove_unused_columns=True)
    assert set(next(iter(trainer.get_train_dataloader()))[0]) == {"prompt", "teacher_prompt"}


# The student as its own teacher


def test_self_is_a_frozen_copy_of_the_student(tmp_path):
    student = tiny_model(0)
    start = {name: parameter.clone() for name, parameter in student.state_dict().items()}
    options = {"dataset": with_column(CONTEXTS[2]), "max_steps": 2}
    named = trained(tmp_path / "self", student=student, teacher="self", **options)
    copied = trained(tmp_path / "copy", student=tiny_model(0), teacher=tiny_model(0), **options)
    assert named[0] == copied[0]
    assert torch.equal(named[1], copied[1])
    assert not all(torch.equal(start[name], parameter) for name, parameter in student.state_dict().items())


def test_self_with_adapters_is_the_base_on_the_same_weights(tmp_path, caplog):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(
        tmp_path, dataset=with_column(CONTEXTS[2]), teacher="self", trainer_options={"peft_config": lora}, max_steps=1
    )
    base = trainer.model.get_base_model()
    assert trainer.teacher_model.model.embed_tokens.weight is base.model.embed_tokens.weight
    assert "start at 0" not in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["token_loss/mean"] > 1e-3


def test_self_without_a_prompt_of_its_own_is_refused(tmp_path):
    with pytest.raises(TOPDError, match=r"every token loss starts at 0.*teacher_prompt"):
        tiny_trainer(tmp_path, teacher="self")


# What is refused


def test_rows_without_a_teacher_s_prompt_are_named(tmp_path):
    rows = with_column("first ", 6).to_list()
    rows[3]["teacher_prompt"], rows[5]["teacher_prompt"] = "", None
    message = r"teacher prompts \(column teacher_prompt\).*row 3: the prompt is empty; row 5: the prompt is None"
    with pytest.raises(DataError, match=message):
        tiny_trainer(tmp_path, dataset=Dataset.from_list(rows))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match=message):
        tiny_trainer(tmp_path, dataset=stream)._teacher_prompt_ids(rows)
    messages = with_column("first ", 2).remove_columns("prompt").add_column("prompt", chat()["prompt"][:2])
    with pytest.raises(DataError, match="row 0: text and messages; use one kind"):
        tiny_trainer(tmp_path, dataset=messages)


def test_a_teacher_s_prompt_that_does_not_fit_is_named_with_its_row(tmp_path):
    dataset = with_column(CONTEXTS[2] * 20)
    with pytest.raises(ContextError, match=r"The teacher's prompt for 'what is [^']*' of \d+ tokens.*the teacher's"):
        tiny_trainer(tmp_path, dataset=dataset, student=tiny_model(0)).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "opd", "opd_loss": "trl"}, "opd_loss=trl gives both models the same prompt"),
        ({"method": "opd", "beta": 0.5}, "beta 1"),
        ({"max_informative_tokens": 5}, "max_informative_tokens needs the same prompt"),
    ],
)
def test_options_that_read_one_prompt_with_both_models_are_refused(tmp_path, options, message):
    with pytest.raises(TOPDError, match=message):
        tiny_trainer(tmp_path, dataset=with_column("first "), **options)


def test_an_evaluation_without_the_column_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"eval_dataset has no column 'teacher_prompt'"):
        tiny_trainer(tmp_path, dataset=with_column("first "), trainer_options={"eval_dataset": prompts(4)})


def test_a_system_turn_for_text_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, teacher_system_prompt="first ")
    with pytest.raises(TOPDError, match="needs prompts as messages"):
        trainer.train()


# Commands


def command(tmp_path, rows):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--student", "embedded:student-standard", "--teacher", "self", "--data", str(data), "--method", "topd",
        "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "4", "--max_completion_length", "24",
        "--use_cpu", "true", "--bf16", "false", "--max_steps", "1", "--window_length", "4", "--report_to", "none",
    ]  # fmt: skip


def test_the_commands_take_self_and_the_column(tmp_path, capsys):
    from topd.cli.main import main

    rows = list(with_column(CONTEXTS[2], 8))
    words = command(tmp_path, rows)
    assert main(["check", *words, "--samples", "2", "--max-new-tokens", "8", "--json"]) in (0, 1)
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["pair"]["verdict"] == found["teacher prompt"]["verdict"] == found["context"]["verdict"] == "ok"
    assert "the first reads 'what is 1+2×3? first 2×3=6" in found["teacher prompt"]["found"]
    assert "mean token loss 0.00" not in found["rollouts"]["found"]
    assert main(["train", *words]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "4 of 4 are those of the student"),
        ({"teacher_prompt": None}, "every token loss starts at 0"),
        ({"teacher_prompt": " "}, "line 1: `teacher_prompt` is blank"),
        ({"teacher_prompt": [{"role": "user", "content": "first "}]}, "text and a conversation; use one kind"),
        ({"teacher_prompt": CONTEXTS[2] * 20}, "The teacher's prompt (row 0) of"),
    ],
)
def test_the_check_before_training_names_what_is_wrong(tmp_path, capsys, change, message):
    from topd.cli.main import main

    rows = [row | change for row in with_column("", 4)]
    assert main(["train", *command(tmp_path, rows)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
