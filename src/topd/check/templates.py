"""Do both chat templates render a conversation to the same ids, and do the prompts go through them?"""

from __future__ import annotations

from typing import Any

from topd.check.finding import Finding, ok
from topd.check.setup import Described, Setup
from topd.loading.prompts import prompt_ids

USER = {"role": "user", "content": "What is 5+(2×3)?"}
CONVERSATIONS: tuple[tuple[str, list[dict[str, str]], bool], ...] = (
    ("a question", [USER], True),
    ("a question after a system message", [{"role": "system", "content": "Be brief."}, USER], True),
    ("a second question", [USER, {"role": "assistant", "content": "11"}, USER], True),
    ("a finished answer", [USER, {"role": "assistant", "content": "11"}], False),
)
"""(what, messages, whether the assistant is to speak next)"""

_COPY = "As the tokenizers are the same, the teacher's chat_template.jinja can be copied into the student's folder."


def templates(setup: Setup) -> Finding:
    """Renders sample conversations, and the data's own prompts, with both."""
    name = "chat templates"
    ours, theirs = (bool(model.tokenizer.chat_template) for model in setup.pair)
    if not setup.conversational:
        return _for_text(setup, theirs)
    if not ours:
        return Finding(
            name, "error", "the prompts are messages, and the student's tokenizer has no chat template",
            "Give prompts as text, or give the student a template. " + (_COPY if theirs else ""),
        )  # fmt: skip
    if not theirs:
        return Finding(
            name, "warning",
            "the teacher has no chat template: it reads prompts in the student's format, which it was not trained on",
            "Take an instruction-tuned teacher, or give prompts as text.",
        )  # fmt: skip
    options = setup.template_options
    alike: dict[tuple[int, ...], Any] = {}
    for i, prompt in enumerate([*setup.prompts[:8]], 1):
        rendered = [_render(model, prompt, True, options) for model in setup.pair]
        if isinstance(rendered[0], str):
            return Finding(name, "error", f"prompt {i}: the student's {rendered[0]}", "Change the prompt or template.")
        if alike.setdefault(tuple(rendered[0]), prompt) != prompt:
            return Finding(
                name, "error", f"different prompts become the same ids (prompt {i} and one before it): the student's "
                "template leaves out what they say",
                "Give the student the template that it was trained with.",
            )  # fmt: skip
        if rendered[0] != rendered[1]:
            return _differ(setup, f"prompt {i} of the data", rendered)
    for what, messages, speaks in CONVERSATIONS:
        rendered = [_render(model, messages, speaks, options) for model in setup.pair]
        if rendered[0] != rendered[1] and not all(isinstance(ids, str) for ids in rendered):
            found = _differ(setup, what, rendered)
            return Finding(name, "warning", found.found, found.remedy)
    return ok(name, f"{len(CONVERSATIONS)} conversations and the data's prompts become the same ids")


def _for_text(setup: Setup, teacher_has_one: bool) -> Finding:
    text, name = setup.prompts[0], "chat templates"
    if not teacher_has_one:
        return ok(name, "the prompts are text; neither is used")
    rendered = _render(setup.teacher, [{"role": "user", "content": text}], True, {})
    if rendered == setup.teacher.tokenizer(text)["input_ids"]:
        return ok(name, "the prompts are text, and the template adds nothing to them")
    return Finding(
        name, "warning", "the prompts are text: no template is applied, though the teacher has one",
        'If the models were trained on conversations, give prompts as [{"role": "user", "content": ...}].',
    )  # fmt: skip


def _differ(setup: Setup, what: str, rendered: list[list[int] | str]) -> Finding:
    shown = [
        ids if isinstance(ids, str) else repr(model.tokenizer.decode(ids))[:160]
        for model, ids in zip(setup.pair, rendered, strict=True)
    ]
    return Finding(
        "chat templates", "error", f"{what} is {shown[0]} to the student, {shown[1]} to the teacher",
        f"The teacher would judge responses in a format that is not its own. {_COPY}",
    )  # fmt: skip


def _render(model: Described, messages: Any, speaks: bool, options: dict[str, Any]) -> list[int] | str:
    """The ids, or why there are none: templates may refuse roles, and those from elsewhere may be broken."""
    try:
        return prompt_ids(model.tokenizer, messages, options, answered=not speaks)
    except Exception as error:  # whatever a template raises
        return f"template fails ({' '.join(str(error).split())[:160]})"
