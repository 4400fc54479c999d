"""Student and teacher before TRL takes them: they are two models with one tokenizer, and nobody's model is changed."""

import logging

import pytest
import torch
from check.bad_pairs import padded_head, swap_two_tokens
from peft import LoraConfig, get_peft_model
from tiny import TOKENIZER, prompts, tiny_model, tiny_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from topd.errors import TokenizerMismatchError, TOPDError
from topd.loading.shared_base import without_adapters
from topd.loading.tokenizers import tokenizer_of
from topd.training.several_teachers import MOPDTrainer
from topd.warmstart import WarmStartConfig, WarmStartTrainer


def lora(**options):
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(7)
    return LoraConfig(**defaults | options)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        TOKENIZER.save_pretrained(folder)
    return folder


# One object as both


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_one_object_as_student_and_teacher_is_refused(tmp_path, method):
    model = tiny_model(0)
    with pytest.raises(TOPDError, match=r"same model object.*nothing is learned"):
        tiny_trainer(tmp_path, student=model, teacher=model, method=method)


def test_one_name_as_student_and_teacher_is_refused(tmp_path):
    with pytest.raises(TOPDError, match=r"same model, .*nothing is learned"):
        tiny_trainer(tmp_path, student="embedded:teacher", teacher="embedded:teacher", tokenizer=None)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_there_is_named_in_python_too(tmp_path, role):
    with pytest.raises(TOPDError, match=r"Cannot load the config of /nowhere: .* Give a folder"):
        tiny_trainer(tmp_path, **{role: "/nowhere"})


def test_other_trainers_refuse_one_object_too(tmp_path):
    model, other = tiny_model(0), tiny_model(1)
    rows = prompts(8).add_column("teacher", ["a", "b"] * 4)
    with pytest.raises(TOPDError, match="same model object"):
        tiny_trainer(tmp_path, MOPDTrainer, rows, student=model, teacher={"a": other, "b": model})
    args = WarmStartConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=64)
    solutions = prompts(4).add_column("completion", ["7"] * 4)
    with pytest.raises(TOPDError, match="same model object"):
        WarmStartTrainer(model, model, args, train_dataset=solutions, processing_class=TOKENIZER)


@pytest.mark.parametrize(("method", "wrapped"), [("topd", False), ("topd", True), ("opd", False)])
def test_with_adapters_the_base_without_them_is_the_teacher_on_the_same_weights(tmp_path, method, wrapped):
    before = {name: p.detach().clone() for name, p in tiny_model(0).named_parameters()}
    options = {"method": method, "max_steps": 2, "learning_rate": 1e-2}
    options |= {} if wrapped else {"trainer_options": {"peft_config": lora()}}
    found = []
    for apart in (True, False):
        student = get_peft_model(tiny_model(0), lora()) if wrapped else tiny_model(0)
        teacher = tiny_model(0) if apart else student
        trainer = tiny_trainer(tmp_path / str(apart), student=student, teacher=teacher, **options)
        found.append(losses(trainer))
    assert min(found[0]) > 0.01
    assert found[0] == found[1]
    assert all(torch.equal(p, before[name]) for name, p in trainer.teacher_model.named_parameters())
    ours = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.teacher_model.parameters()} <= ours


def test_the_inner_model_of_adapters_is_the_student_too(tmp_path):
    student = get_peft_model(tiny_model(0), lora(modules_to_save=["norm"]))
    trainer = tiny_trainer(tmp_path, student=student, teacher=student.get_base_model(), max_steps=2)
    assert min(losses(trainer)) > 0.01
    assert not any("lora" in name or "modules_to_save" in name for name, _ in trainer.teacher_model.named_parameters())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(trainer.teacher_model(ids).logits, tiny_model(0)(ids).logits)


def test_a_base_that_moves_or_has_moved_is_no_teacher(tmp_path):
    student = get_peft_model(tiny_model(0), lora())
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(TOPDError, match=r"would change the base.*norm.weight"):
        tiny_trainer(tmp_path, student=student, teacher=student)
    with pytest.raises(TOPDError, match=r"pissa.*changes the base's weights"):
        without_adapters(get_peft_model(tiny_model(0), lora(init_lora_weights="pissa")))
    merged = get_peft_model(tiny_model(0), lora())
    merged.merge_adapter()
    with pytest.raises(TOPDError, match="unmerge_adapter"):
        without_adapters(merged)


def test_one_name_with_adapters_is_loaded_once(tmp_path):
    folder = str(saved(tiny_model(0), tmp_path / "model"))
    trainer = tiny_trainer(
        tmp_path / "run", student=folder, teacher=folder, tokenizer=None, trainer_options={"peft_config": lora()}
    )
    ours = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in trainer.teacher_model.parameters()} <= ours
    assert min(losses(trainer)) > 0.01


# Tokenizers of loaded models


def loaded(model, folder, other=False):
    saved(model, folder)
    if other:
        swap_two_tokens(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_loaded_models_with_different_tokenizers_are_refused(tmp_path):
    teacher = loaded(tiny_model(1), tmp_path / "teacher", other=True)
    with pytest.raises(TokenizerMismatchError, match=r"different ids.*'7'"):
        tiny_trainer(tmp_path / "run", teacher=teacher)
    student = loaded(tiny_model(0), tmp_path / "student")
    with pytest.raises(TokenizerMismatchError, match=r"different ids.*'7'"):
        tiny_trainer(tmp_path / "run", student=student, teacher=teacher, tokenizer=None)


def test_loaded_models_whose_tokenizer_is_not_known_are_warned_of(tmp_path, caplog):
    nameless = tiny_model(1)
    without = AutoModelForCausalLM.from_pretrained(saved(tiny_model(1), tmp_path / "teacher", tokenizer=False))
    for teacher in (nameless, without):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tiny_trainer(tmp_path / "run", teacher=teacher)
        assert "tokenizers were not compared: the teacher's is unknown" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path / "run", teacher=loaded(tiny_model(1), tmp_path / "with"))
    assert "not compared" not in caplog.text


def test_a_student_without_any_tokenizer_is_refused(tmp_path):
    with pytest.raises(TOPDError, match="processing_class=tokenizer"):
        tiny_trainer(tmp_path, tokenizer=None)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_tokenizer_is_not_made_up_for_a_folder_without_one(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(TOPDError, match=f"{tmp_path.name} contains no tokenizer. Save the model's own"):
        tokenizer_of(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    folder = str(saved(tiny_model(1), tmp_path / "teacher", tokenizer=False))
    with pytest.raises(TOPDError, match="teacher contains no tokenizer"):
        tiny_trainer(tmp_path / "run", teacher=folder)


# Heads


def test_no_head_is_cut_below_the_tokenizer(tmp_path):
    small = tiny_model(1)
    small.resize_token_embeddings(40)
    with pytest.raises(TokenizerMismatchError, match=r"teacher's output head has 40 rows.*\(40\).* 2 more"):
        tiny_trainer(tmp_path, teacher=small)
    student = tiny_model(0)
    student.resize_token_embeddings(40)
    with pytest.raises(TokenizerMismatchError, match="student's output head has 40 rows"):
        tiny_trainer(tmp_path, student=student)
    named = str(padded_head(tmp_path / "small", rows=40))
    with pytest.raises(TokenizerMismatchError, match="teacher's output head has 40 rows"):
        tiny_trainer(tmp_path, teacher=named)


def test_an_added_token_that_neither_head_knows_is_a_warning(tmp_path, caplog):
    """As with Gemma 3, whose tokenizer has a token for images beyond the head of its text models."""
    tokenizer = TOKENIZER.__class__.from_pretrained(saved(tiny_model(0), tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    teacher = tiny_model(1)
    teacher.resize_token_embeddings(64)
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path / "run", teacher=teacher, tokenizer=tokenizer)
    assert "'<image>' (47). Prompts must not contain them" in caplog.text
    student = tiny_model(0)
    student.resize_token_embeddings(64)
    with pytest.raises(TokenizerMismatchError, match=r"teacher's output head has 47 rows.*'<image>'"):
        tiny_trainer(tmp_path / "run", student=student, tokenizer=tokenizer)


def test_the_callers_teacher_keeps_its_head_and_a_students_cut_is_reported(tmp_path, caplog):
    teacher = tiny_model(1)
    teacher.resize_token_embeddings(64)
    before = teacher.get_input_embeddings().weight.detach().clone()
    trainer = tiny_trainer(tmp_path / "a", teacher=teacher)
    assert teacher.config.vocab_size == 64
    assert torch.equal(teacher.get_input_embeddings().weight, before)
    assert trainer.teacher_model.get_output_embeddings().weight.shape[0] == 47
    inner = teacher.model.layers[0].self_attn.q_proj.weight
    assert trainer.teacher_model.model.layers[0].self_attn.q_proj.weight is inner
    trainer.train()

    student = tiny_model(0)
    student.resize_token_embeddings(64)
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path / "b", student=student)
    assert "The student's output head is cut in place" in caplog.text
    assert "cut to 47" in caplog.text


# Names as the command line takes them


def test_embedded_names_and_paths_work_in_python(tmp_path):
    trainer = tiny_trainer(
        tmp_path / "a", student="embedded:student-easy", teacher=saved(tiny_model(1), tmp_path / "teacher"),
        tokenizer=None, max_steps=1,
    )  # fmt: skip
    assert losses(trainer)[0] > 0
    with pytest.raises(TOPDError, match="no embedded model 'student'"):
        tiny_trainer(tmp_path / "b", student="embedded:student")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtypes_of_both_may_be_names_or_torchs_own(tmp_path, dtype):
    student, teacher = (saved(tiny_model(seed), tmp_path / str(seed)) for seed in (0, 1))
    options = {"model_init_kwargs": {"dtype": torch.float32}, "teacher_model_init_kwargs": {"dtype": dtype}}
    trainer = tiny_trainer(tmp_path / "run", student=student, teacher=teacher, **options)
    assert (trainer.model.dtype, trainer.teacher_model.dtype) == (torch.float32, torch.bfloat16)
    assert trainer.args.model_init_kwargs == {"dtype": torch.float32}
    for wrong in ({"model_init_kwargs": {"dtype": "bf16"}}, {"teacher_model_init_kwargs": {"dtype": "bf16"}}):
        with pytest.raises(TOPDError, match="dtype is 'bf16'; write auto, float32"):
            tiny_trainer(tmp_path / "run", student=student, teacher=teacher, **wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_old_name_of_dtype_sets_the_dtype(tmp_path, dtype):
    student, teacher = (saved(tiny_model(seed), tmp_path / str(seed)) for seed in (0, 1))
    old = {"torch_dtype": dtype}
    options = {"model_init_kwargs": old, "teacher_model_init_kwargs": '{"torch_dtype": "float16"}'}
    trainer = tiny_trainer(tmp_path / "run", student=student, teacher=teacher, **options)
    assert (trainer.model.dtype, trainer.teacher_model.dtype) == (torch.bfloat16, torch.float16)
    assert old == {"torch_dtype": dtype}
    warm = WarmStartConfig(str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=old | {"dtype": "float32"})
    assert warm.model_init_kwargs == {"dtype": "float32"}
