"""Each check finds what it is for, and says what to do."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bad_pairs import change, conversations, copy_of, other_end, other_splitting, other_tokenizer, padded_head
from bad_pairs import short_context as short_context_pair

from topd.check import machine, prompts, quality, tokens
from topd.check.checks import QUICK, quick_findings
from topd.check.findings import Finding, worst
from topd.check.setup import Setup
from topd.cli.check import parsed
from topd.cli.train import setups_of
from topd.embedded.task import make_problems
from topd.errors import ContextError
from topd.loading.precision import HALF_A_STEP, WEIGHT

RECIPE = ["--config", "recipe:embedded"]


def setup_for(student="embedded:student-standard", teacher="embedded:teacher", *more) -> Setup:
    names = ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(teacher)]
    return setups_of(*parsed([*RECIPE, *names, *map(str, more)]))[""]


def by_name(findings) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture(scope="module")
def embedded():
    return setup_for()


def test_the_embedded_pair_is_ready(embedded):
    findings = quick_findings(embedded)
    always = [name for name, check in QUICK.items() if check.__module__ != "topd.check.optional"]
    assert len(always) == 12
    assert {finding.check: finding.verdict for finding in findings} == dict.fromkeys(always, "ok")
    assert all(finding.found and not finding.remedy for finding in findings)


BAD = [
    (other_tokenizer, [], "vocabulary", r"'7' \(29 and 30\)", "GOLDTrainer"),
    (other_splitting, [], "tokenization", r"becomes 30 and 33 tokens; they differ from token 2 on", "one tokenizer"),
    (other_end, [], "end tokens", r"'<unk>' \(2\)", r"\[1, 2\] in the student's generation_config"),
    (other_end, ["--data"], "chat templates", "' first what is", "chat_template.jinja can be copied"),
    (short_context_pair, [], "context", "do not fit the teacher's context of 64", "lower max_completion_length"),
]


@pytest.mark.parametrize(("make", "more", "check", "found", "remedy"), BAD)
def test_a_bad_pair_is_found_by_the_check_for_it(tmp_path, make, more, check, found, remedy):
    data = [*more, conversations(tmp_path / "data.jsonl")] if more else []
    finding = by_name(quick_findings(setup_for("embedded:student-standard", make(tmp_path / "teacher"), *data)))[check]
    assert finding.verdict == "error"
    assert_says(finding, found, remedy)


def assert_says(finding, found, remedy):
    assert re.search(found, finding.found), finding.found
    assert re.search(remedy, finding.remedy), finding.remedy


@pytest.mark.parametrize(("make", "check"), [(other_tokenizer, "vocabulary"), (other_splitting, "tokenization")])
def test_only_the_check_for_it_finds_it(tmp_path, make, check):
    findings = quick_findings(setup_for("embedded:student-standard", make(tmp_path / "teacher")))
    assert [finding.check for finding in findings if finding.verdict == "error"] == [check]


def test_a_student_that_ends_earlier_is_a_warning(tmp_path):
    finding = tokens.end_tokens(setup_for(other_end(tmp_path / "student")))
    assert finding.verdict == "warning"
    assert_says(finding, r"also ends at '<unk>' \(2\)", r"\[1\]")


def test_end_tokens_follow_the_rule_of_the_trainer(tmp_path):
    """What the check calls end tokens is what TRL ends rollouts at."""
    from tiny import tiny_trainer

    folder = other_end(tmp_path / "student")
    trainer = tiny_trainer(tmp_path / "run", student=str(folder), tokenizer=None)
    assert sorted(trainer.eos_token_ids) == setup_for(folder).student.end_tokens


def test_special_tokens_that_differ_are_named(tmp_path):
    teacher = copy_of("teacher", tmp_path / "teacher")
    change(teacher / "tokenizer_config.json", pad_token="<eos>")
    finding = tokens.special_tokens(setup_for("embedded:student-standard", teacher))
    assert finding.verdict == "warning"
    assert_says(finding, r"pad_token: '<pad>' \(student\), '<eos>' \(teacher\)", "save its tokenizer")


def test_pad_that_is_end_is_no_problem(tmp_path):
    student = copy_of("student-standard", tmp_path / "student")
    change(student / "tokenizer_config.json", pad_token="<eos>")
    change(student / "generation_config.json", pad_token_id=1)
    teacher = copy_of("teacher", tmp_path / "teacher")
    change(teacher / "tokenizer_config.json", pad_token="<eos>")
    change(teacher / "generation_config.json", pad_token_id=1)
    finding = tokens.special_tokens(setup_for(student, teacher))
    assert finding.verdict == "ok"
    assert "pad '<eos>', end '<eos>'" in finding.found


def test_heads_padded_to_different_sizes_are_said_and_one_too_small_refused(tmp_path):
    finding = tokens.heads(setup_for("embedded:student-standard", padded_head(tmp_path / "teacher")))
    assert finding.verdict == "ok"
    assert "64 (teacher)" in finding.found
    assert "cut to 47" in finding.found
    vllm = setup_for(padded_head(tmp_path / "student", role="student-standard"), "embedded:teacher")
    vllm.config.use_vllm = True
    assert tokens.heads(vllm).verdict == "warning"
    small = setup_for("embedded:student-standard", padded_head(tmp_path / "small", rows=40))
    finding = by_name(quick_findings(small))["output heads"]
    assert finding.verdict == "error"
    assert_says(finding, r"teacher's output head has 40 rows.*\(40\).* and 2 more", "a pair of one family")


def template(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    return folder


MESSAGES = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "verdict", "found"),
    [
        ("{{ raise_exception('no system here') }}", "error", "template fails.*no system here"),
        ("{{ ''.__class__.__mro__ }}" + MESSAGES, "error", "template fails"),  # the sandbox holds
        ("{% if messages %}", "error", "template fails"),
        (" {% if false %}{{ messages }}{% endif %}", "error", "template fails.*writes nothing"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + MESSAGES, "warning",
         "system message.*template fails"),
    ],
)  # fmt: skip
def test_templates_that_fail(tmp_path, text, verdict, found):
    student = template(copy_of("student-standard", tmp_path / "student"), text)
    setup = setup_for(student, "embedded:teacher", "--data", conversations(tmp_path / "data.jsonl"))
    finding = tokens.templates(setup)
    assert finding.verdict == verdict
    assert_says(finding, found, ".")
    if "sandbox" not in found and verdict == "error":
        broken = by_name(quick_findings(setup))
        assert broken["data"].verdict == broken["context"].verdict == "error"
        assert "cannot render a conversation" in broken["data"].found


def test_a_template_that_leaves_out_what_is_asked(tmp_path):
    student = template(copy_of("student-standard", tmp_path / "student"), "{{ messages[0]['role'] }}")
    finding = tokens.templates(setup_for(student, student, "--data", conversations(tmp_path / "data.jsonl")))
    assert finding.verdict == "error"
    assert_says(finding, "different prompts become the same ids", "template")


def test_models_without_a_template(tmp_path):
    data = conversations(tmp_path / "data.jsonl")
    bare = copy_of("teacher", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert tokens.templates(setup_for(bare, "embedded:teacher", "--data", data)).verdict == "error"
    assert tokens.templates(setup_for("embedded:teacher", bare, "--data", data)).verdict == "warning"
    assert tokens.templates(setup_for(bare, bare)).found == "the prompts are text; no template is used"


def test_text_for_a_model_of_conversations_is_a_warning(tmp_path):
    teacher = template(copy_of("teacher", tmp_path / "teacher"), "{{ ' first ' }}" + MESSAGES)
    finding = tokens.templates(setup_for("embedded:student-standard", teacher))
    assert finding.verdict == "warning"
    assert '"role": "user"' in finding.remedy


def test_the_data_is_shown_as_the_models_read_it(embedded, tmp_path):
    assert embedded.prompts[0] in prompts.sample(embedded).found
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Größe?"}) + "\n")
    finding = prompts.sample(setup_for("embedded:teacher", "embedded:teacher", "--data", data))
    assert finding.verdict == "warning"
    assert "<unk>" in finding.found


def test_a_beginning_that_comes_twice_is_found(tmp_path):
    folder = copy_of("teacher", tmp_path / "model")
    change(folder / "tokenizer_config.json", bos_token="<unk>")
    template(folder, "{{ bos_token }}{{ bos_token }}" + MESSAGES)
    setup = setup_for(folder, folder, "--data", conversations(tmp_path / "data.jsonl"))
    finding = prompts.sample(setup)
    assert finding.verdict == "warning"
    assert "twice; one is removed" in finding.found


def test_a_beginning_that_the_template_leaves_out_is_found(tmp_path):
    folder = copy_of("teacher", tmp_path / "model")
    change(folder / "tokenizer_config.json", bos_token="<unk>")
    file = folder / "tokenizer.json"
    unk = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
    change(file, post_processor={
        "type": "TemplateProcessing", "single": [unk, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<unk>": {"id": "<unk>", "ids": [2], "tokens": ["<unk>"]}},
    })  # fmt: skip
    data = conversations(tmp_path / "data.jsonl")
    template(folder, MESSAGES)
    finding = prompts.sample(setup_for(folder, folder, "--data", data))
    assert finding.verdict == "warning"
    assert "does not begin with '<unk>'" in finding.found
    template(folder, "{{ bos_token }}" + MESSAGES)
    assert "begin" not in prompts.sample(setup_for(folder, folder, "--data", data)).found.split("; the first")[0]


def test_the_longest_prompt_counts_wherever_it_stands(tmp_path):
    data = tmp_path / "data.jsonl"
    texts = ["what is 1+1?"] * 999 + ["what is " + "+".join("1" * 80) + "?"]
    texts.insert(501, texts.pop())
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with pytest.raises(ContextError, match="162 tokens"):
        prompts.context(setup_for("embedded:student-standard", "embedded:teacher", "--data", data))


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (["--dtype", "bfloat16", "--learning_rate", "2e-6"], "warning"),
        (["--dtype", "bfloat16", "--learning_rate", "1e-3"], "ok"),
        (["--dtype", "bfloat16", "--learning_rate", "2e-6", "--use_peft", "true"], "ok"),
        (["--learning_rate", "2e-6"], "ok"),
    ],
)
def test_a_learning_rate_that_rounding_eats(options, verdict):
    finding = machine.precision(setup_for("embedded:student-standard", "embedded:teacher", *options))
    assert finding.verdict == verdict
    assert (verdict == "ok") == (not finding.remedy)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_keeps_float32_weights(monkeypatch, kind):
    setup = setup_for("embedded:student-standard", "embedded:teacher", "--dtype", "bfloat16", "--learning_rate", "2e-6")
    setup.config.bf16 = True
    assert machine.precision(setup).verdict == "warning"
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    assert machine.precision(setup).verdict == "ok"
    assert "not counted" in machine.memory(setup).found


def test_trl_s_loss_is_not_said_to_autocast():
    setup = setup_for("embedded:student-standard", "embedded:teacher", "--bf16", "true")
    assert "computed bfloat16 autocast" in machine.precision(setup).found
    needs = machine.needs(setup, *[machine.shape(each, "auto") for each in setup.pair])
    setup.config.method, setup.config.opd_loss = "opd", "trl"
    assert "computed as stored (TRL's loss does not autocast" in machine.precision(setup).found
    plain = machine.needs(setup, *[machine.shape(each, "auto") for each in setup.pair])
    assert needs["the loss"]["weights in bf16"] > plain["the loss"]["weights in bf16"] == 0
    setup.config.opd_loss = "one_pass"
    assert "computed bfloat16 autocast" in machine.precision(setup).found


def test_rounding_does_eat_it():
    """The bound of the check, on usual weights: below it nearly none moves, well above it nearly all do."""
    weights = (WEIGHT * torch.randn(20_000)).bfloat16()
    bound = WEIGHT * HALF_A_STEP["bfloat16"]

    def moved(step):
        return float(((weights - step) != weights).float().mean())

    assert moved(2e-6) < 0.1
    assert moved(16 * bound) > 0.9


@pytest.mark.parametrize(("needed", "verdict"), [(0.5, "ok"), (1.2, "warning"), (2.0, "error")])
def test_memory_is_weighed_against_what_is_there(monkeypatch, needed, verdict, embedded):
    phases = {
        "always": {"student": needed},
        "sampling": {"x": 0.0},
        "looking ahead": {"x": 0.0},
        "the loss": {"x": 0.0},
    }
    monkeypatch.setattr(machine, "needs", lambda *_: dict(phases))
    monkeypatch.setattr(machine, "available", lambda _: (1.0, "free"))
    finding = machine.memory(embedded)
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_parameters_are_those_of_the_model(embedded):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded.teacher.folder)
    shape = machine.shape(embedded.teacher, "float32")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weights == sum(p.numel() * p.element_size() for p in model.parameters())


def test_activations_are_about_what_autograd_keeps(embedded):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(embedded.teacher.folder).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.ones(1, 200, dtype=torch.long), use_cache=False)
    shape = machine.shape(embedded.teacher, "float32")
    estimate = 200 * shape.layers * shape.layer_elements * 4
    assert estimate == pytest.approx(sum(size for size, _ in kept.values()), rel=0.25)


@pytest.mark.parametrize(
    ("options", "part", "less"),
    [
        (["--gradient_checkpointing", "true"], ("the loss", "activations"), True),
        (["--per_device_train_batch_size", "4"], ("the loss", "activations"), True),
        (["--max_completion_length", "48"], ("sampling", "keys and values"), True),
        (["--optim", "adamw_torch_8bit"], ("always", "optimizer"), True),
        (["--dtype", "bfloat16"], ("always", "student"), True),
        (["--use_peft", "true"], ("the loss", "gradients"), True),
        (["--window_length", "32"], ("looking ahead", "windows"), False),
    ],
)
def test_what_the_remedies_advise_does_help(embedded, options, part, less):
    def size(setup):
        shapes = [machine.shape(model, setup.dtypes[model.role]) for model in setup.pair]
        return machine.needs(setup, *shapes)[part[0]][part[1]]

    before, after = size(embedded), size(setup_for("embedded:student-standard", "embedded:teacher", *options))
    assert (after < before) == less


def test_a_teacher_on_a_server_alone_takes_no_memory_here(embedded):
    alone = replace(embedded, teacher_here=False)
    shapes = [machine.shape(model, embedded.dtypes[model.role]) for model in embedded.pair]
    here, elsewhere = (machine.needs(setup, *shapes) for setup in (embedded, alone))
    assert here["always"]["teacher"] > elsewhere["always"]["teacher"] == 0
    assert here["always"]["student"] == elsewhere["always"]["student"]
    assert here["looking ahead"]["windows"] > elsewhere["looking ahead"]["windows"] > 0


def test_disk(embedded, monkeypatch, tmp_path):
    assert machine.disk(embedded).verdict == "ok"
    for free, verdict in ((10**7, "error"), (1.6e7, "warning")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        finding = machine.disk(embedded)
        assert finding.verdict == verdict
        assert "--save_total_limit" in finding.remedy


@pytest.fixture(scope="module")
def models():
    from topd.loading.pair import load_pair

    return load_pair("embedded:student-standard", "embedded:teacher")[:2]


def test_a_few_rollouts_of_the_embedded_pair(embedded, models):
    torch.manual_seed(0)
    finding = quality.rollout_figures(embedded, *models, 8, 96)
    assert finding.verdict == "ok"
    assert "8 rollouts" in finding.found
    assert " 0 not ended" in finding.found
    short = quality.rollout_figures(embedded, *models, 8, 5)
    assert " 8 not ended after 5" in short.found


def test_models_that_do_not_agree_at_all(embedded, models):
    from tiny import tiny_model

    stranger = tiny_model(3)
    assert quality.rollout_figures(embedded, stranger, models[1], 4, 20).verdict == "warning"
    with torch.no_grad():
        stranger.lm_head.weight[3, 0] = torch.nan
    finding = quality.rollout_figures(embedded, models[0], stranger, 4, 20)
    assert finding.verdict == "error"
    assert "NaN" in finding.remedy


def test_the_teacher_knows_more(embedded, models):
    student, teacher = models
    assert quality.teacher_knows_more(embedded, student, teacher, 16, 96).verdict == "ok"
    turned = quality.teacher_knows_more(embedded, teacher, student, 16, 96)
    assert turned.verdict == "warning"
    assert "little to learn" in turned.remedy
    assert "No answer is correct within 5" in quality.teacher_knows_more(embedded, student, teacher, 4, 5).remedy


def test_answers_of_other_data_are_judged_by_mathematics(models, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "what is 1+1?", "answer": 2}\n{"prompt": "what is 1+2?"}\n')
    setup = setup_for("embedded:student-standard", "embedded:teacher", "--data", data)
    finding = quality.teacher_knows_more(setup, *models, 2, 20)
    assert "of 1: teacher 0, student 0 (the last \\boxed{} of each, as mathematics)" in finding.found
    data.write_text('{"prompt": "what is 1+1?"}\n')
    setup = setup_for("embedded:student-standard", "embedded:teacher", "--data", data)
    assert quality.teacher_knows_more(setup, *models, 2, 20).verdict == "ok"


@pytest.mark.parametrize("messages", [False, True])
def test_the_embedded_task_s_problems_in_a_file_are_judged_by_its_own_rule(models, tmp_path, messages):
    problems, data = make_problems(8, 5, held_out=True), tmp_path / "data.jsonl"

    def setup(answers):
        rows = [
            {"prompt": [{"role": "user", "content": each.prompt}] if messages else each.prompt, "answer": answer}
            for each, answer in zip(problems, answers, strict=True)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": rows[0]["prompt"]}]))
        return setup_for("embedded:student-standard", "embedded:teacher", "--data", data)

    own = setup([each.answer for each in problems])
    assert quality.rule_of(own) == "embedded"
    ordinary = [str(eval(each.expression.replace("×", "*"))) for each in problems]  # not modulo 100
    assert quality.rule_of(setup(ordinary)) == "math"
    if messages:
        found = quality.teacher_knows_more(own, *models, 8, 96).found
        assert re.search(r"of 8: teacher [78], .*as in the embedded task", found), found


@pytest.mark.parametrize("name", ["lm", "lm-tuning"])
def test_the_language_model_pair_s_problems_are_judged_by_the_number_behind_the_hashes(name):
    setup = setup_for("embedded:student-standard", "embedded:teacher", "--data", name)
    assert quality.rule_of(setup) == "gsm8k"


def test_worst():
    findings = [Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "ok", "")]
    assert worst([]) == "ok"
    assert worst(findings) == "warning"
    assert worst([*findings, Finding("d", "error", "")]) == "error"
