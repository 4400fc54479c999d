"""Do both models have the same tokens, end tokens, output heads and chat templates?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from topd.check.findings import Finding, fails, ok, warns
from topd.check.setup import ModelInfo, Setup
from topd.evaluation.benchmarks import text_of
from topd.loading.pair import heads_message
from topd.loading.prompts import prompt_ids
from topd.loading.tokenizers import check_rows, check_tokenizers

TEXTS = (
    "What is 5+(2×3)? Show 12,345.678 and 0x1F.",
    "  def f(x):\n\treturn {'a': x**2}  # twice\n\n",
    "Größe, naïve café, 東京で会いましょう, здравствуй, مرحبا, e\u0301 and é, ﬁ",
    "🙂👩‍👩‍👧 don't   stop\r\n\\boxed{\\frac{1}{2}}",
)
"""Texts that tokenizers treat differently: digits, spaces, code, accents, other scripts."""


def vocabulary(setup: Setup) -> Finding:
    """Raises `TokenizerMismatchError` unless every token, also an added one, has the same id in both tokenizers."""
    check_tokenizers(setup.student.tokenizer, setup.teacher.tokenizer)
    return ok(f"the same {len(setup.student.tokenizer.get_vocab()):,} tokens with the same ids")


def texts(setup: Setup) -> Finding:
    """Whether both tokenizers split text alike: merges, normalizers and pre-tokenizers."""
    samples = [*TEXTS, *map(text_of, setup.prompts[:8])]
    for text in samples:
        ours, theirs = (
            model.tokenizer.convert_ids_to_tokens(model.tokenizer(text)["input_ids"]) for model in setup.pair
        )
        if ours != theirs:
            where = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            return fails(
                f"{text[:40]!r} becomes {len(ours)} and {len(theirs)} tokens; they differ from token {where} on: "
                f"{ours[where : where + 4]} (student), {theirs[where : where + 4]} (teacher)",
                "Give both models one tokenizer: save the teacher's into the student's folder, if the student was "
                "trained with it; else choose a pair of one family.",
            )
    return ok(f"{len(samples)} texts (code, numbers, other scripts, the data's) become the same tokens")


def heads(setup: Setup) -> Finding:
    """How heads that are padded to different sizes are cut. Raises `TokenizerMismatchError` if a token has no row."""
    needed = 1 + max(setup.student.tokenizer.get_vocab().values())
    rows = [int(model.text_config.vocab_size) for model in setup.pair]
    note = check_rows(setup.student.tokenizer, *rows)
    if note:
        return warns(*note.split(". ", 1))
    if rows[0] == rows[1]:
        return ok(f"{rows[0]:,} rows in both, {rows[0] - needed:,} of them padding")
    if not setup.teacher_here:
        return ok(f"{rows[0]:,} rows (student), {rows[1]:,} (teacher, on the server); none is cut")
    if rows[0] > rows[1] and setup.config.use_vllm:
        return warns(
            heads_message(*rows),
            "vLLM loads the student with its larger head. Save the student once with the smaller one "
            f"(resize_token_embeddings({rows[1]})) and name that folder.",
        )
    return ok(heads_message(*rows))


def end_tokens(setup: Setup) -> Finding:
    """Whether every token that ends the teacher's responses ends the student's; else rollouts continue past the end."""
    ours, theirs = (model.end_tokens for model in setup.pair)
    if not ours:
        return fails("the student has none", f"Set eos_token_id: {theirs} in its generation config.")
    only_theirs, only_ours = sorted({*theirs} - {*ours}), sorted({*ours} - {*theirs})
    if only_theirs:
        return fails(
            f"the teacher ends at {_named(setup.teacher, theirs)}, the student at {_named(setup.student, ours)}: it "
            f"would continue after {_named(setup.teacher, only_theirs)}",
            f'Set "eos_token_id": {sorted({*ours, *theirs})} in the student\'s generation_config.json.',
        )
    if only_ours:
        return warns(
            f"the student also ends at {_named(setup.student, only_ours)}, the teacher does not",
            f'Set "eos_token_id": {theirs} in the student\'s generation_config.json, unless this is intended.',
        )
    return ok(f"both end at {_named(setup.student, ours)}")


def special_tokens(setup: Setup) -> Finding:
    """BOS, EOS and padding tokens of tokenizers and generation configs."""
    differ, tokenizer = [], setup.student.tokenizer
    for what in ("bos_token", "eos_token", "pad_token"):
        ours, theirs = (getattr(model.tokenizer, what) for model in setup.pair)
        if ours != theirs:
            differ.append(f"{what}: {ours!r} (student), {theirs!r} (teacher)")
    for model in setup.pair:
        declared, own = model.generation.pad_token_id, model.tokenizer.pad_token_id
        if declared is not None and own is not None and declared != own:
            differ.append(f"{model.role}'s pad token: {own} (tokenizer), {declared} (generation config)")
    if differ:
        return warns(
            "; ".join(differ),
            "The student's are used for both. If the teacher's are correct, save its tokenizer into the "
            "student's folder.",
        )
    return ok(f"the same in both; pad {tokenizer.pad_token!r}, end {tokenizer.eos_token!r}")


def _named(model: ModelInfo, ids: Sequence[int]) -> str:
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids) or "nothing"


USER = {"role": "user", "content": "What is 5+(2×3)?"}
CONVERSATIONS: tuple[tuple[str, list[dict[str, str]], bool], ...] = (
    ("a question", [USER], True),
    ("a question after a system message", [{"role": "system", "content": "Be brief."}, USER], True),
    ("a second question", [USER, {"role": "assistant", "content": "11"}, USER], True),
    ("a finished answer", [USER, {"role": "assistant", "content": "11"}], False),
)
"""(name, messages, whether a generation prompt follows)"""

_COPY = "As the tokenizers are the same, the teacher's chat_template.jinja can be copied into the student's folder."


def templates(setup: Setup) -> Finding:
    """Whether both templates render sample conversations and the data's prompts to the same ids."""
    ours, theirs = (bool(model.tokenizer.chat_template) for model in setup.pair)
    if not setup.conversational:
        return _for_text(setup, theirs)
    if not ours:
        return fails(
            "the prompts are messages, and the student's tokenizer has no chat template",
            "Give prompts as text, or give the student a template. " + (_COPY if theirs else ""),
        )
    if not theirs:
        return warns(
            "the teacher has no chat template: it gets prompts in the student's format, which it was not trained on",
            "Use an instruction-tuned teacher, or give prompts as text.",
        )
    options = setup.template_options
    alike: dict[tuple[int, ...], Any] = {}
    for i, prompt in enumerate([*setup.prompts[:8]], 1):
        rendered = [_render(model, prompt, True, options) for model in setup.pair]
        if isinstance(rendered[0], str):
            return fails(f"prompt {i}: the student's {rendered[0]}", "Change the prompt or template.")
        if alike.setdefault(tuple(rendered[0]), prompt) != prompt:
            return fails(
                f"different prompts become the same ids (prompt {i} and one before it): the student's "
                "template drops part of the prompts",
                "Give the student the template that it was trained with.",
            )
        if rendered[0] != rendered[1]:
            return _differ(setup, f"prompt {i} of the data", rendered)
    for what, messages, generates in CONVERSATIONS:
        rendered = [_render(model, messages, generates, options) for model in setup.pair]
        if rendered[0] != rendered[1] and not all(isinstance(ids, str) for ids in rendered):
            return replace(_differ(setup, what, rendered), verdict="warning")
    return ok(f"{len(CONVERSATIONS)} conversations and the data's prompts have the same ids in both")


def _for_text(setup: Setup, teacher_has_one: bool) -> Finding:
    if not teacher_has_one:
        return ok("the prompts are text; no template is used")
    text = setup.prompts[0]
    rendered = _render(setup.teacher, [{"role": "user", "content": text}], True, {})
    if rendered == setup.teacher.tokenizer(text)["input_ids"]:
        return ok("the prompts are text, and the template adds nothing to them")
    return warns(
        "the prompts are text: no template is applied, though the teacher has one",
        'If the models were trained on conversations, give prompts as [{"role": "user", "content": ...}].',
    )


def _differ(setup: Setup, what: str, rendered: list[list[int] | str]) -> Finding:
    shown = [
        ids if isinstance(ids, str) else repr(model.tokenizer.decode(ids))[:160]
        for model, ids in zip(setup.pair, rendered, strict=True)
    ]
    return fails(
        f"{what} is {shown[0]} to the student, {shown[1]} to the teacher",
        f"The teacher would score responses in another format than its own. {_COPY}",
    )


def _render(model: ModelInfo, messages: Any, generates: bool, options: dict[str, Any]) -> list[int] | str:
    """The ids; or why there are none, since a template may reject roles or be broken."""
    try:
        return prompt_ids(model.tokenizer, messages, options, answered=not generates)
    except Exception as error:  # a template may raise anything
        return f"template fails ({' '.join(str(error).split())[:160]})"
