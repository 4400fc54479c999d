"""Do both models speak of the same tokens, and end where the other ends?"""

from __future__ import annotations

from collections.abc import Sequence

from topd.check.finding import Finding, ok
from topd.check.setup import Described, Setup
from topd.errors import TokenizerMismatchError
from topd.loading.pair import heads_in_words
from topd.loading.tokenizers import check_rows, check_tokenizers

TEXTS = (
    "What is 5+(2×3)? Show 12,345.678 and 0x1F.",
    "  def f(x):\n\treturn {'a': x**2}  # twice\n\n",
    "Größe, naïve café, 東京で会いましょう, здравствуй, مرحبا, e\u0301 and é, ﬁ",
    "🙂👩‍👩‍👧 don't   stop\r\n\\boxed{\\frac{1}{2}}",
)
"""What pre-tokenizers, normalizers and merges treat differently: digits, spaces, code, accents, other scripts."""


def vocabulary(setup: Setup) -> Finding:
    """Every token, added ones too, has the same id in both tokenizers."""
    try:
        check_tokenizers(setup.student.tokenizer, setup.teacher.tokenizer)
    except TokenizerMismatchError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding("vocabulary", "error", found, remedy)
    return ok("vocabulary", f"the same {len(setup.student.tokenizer.get_vocab()):,} tokens with the same ids")


def texts(setup: Setup) -> Finding:
    """The same text is split into the same tokens: merges, normalizers and pre-tokenizers agree too."""
    samples = [*TEXTS, *(p if isinstance(p, str) else p[-1]["content"] for p in setup.prompts[:8])]
    for text in samples:
        ours, theirs = (
            model.tokenizer.convert_ids_to_tokens(model.tokenizer(text)["input_ids"]) for model in setup.pair
        )
        if ours != theirs:
            where = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            return Finding(
                "tokenization", "error",
                f"{text[:40]!r} becomes {len(ours)} and {len(theirs)} tokens; they part at token {where}: "
                f"{ours[where : where + 4]} (student), {theirs[where : where + 4]} (teacher)",
                "Give both models one tokenizer: save the teacher's into the student's folder, if the student was "
                "trained with it; else choose a pair of one family.",
            )  # fmt: skip
    return ok("tokenization", f"{len(samples)} texts (code, numbers, other scripts, the data's) become the same tokens")


def heads(setup: Setup) -> Finding:
    """Each output head has a row for every token; heads padded to different sizes are cut.

    Raises:
        TokenizerMismatchError: tokens have no row.
    """
    needed = 1 + max(setup.student.tokenizer.get_vocab().values())
    rows = [int(model.text_config.vocab_size) for model in setup.pair]
    note = check_rows(setup.student.tokenizer, *rows)
    if note:
        return Finding("output heads", "warning", *note.split(". ", 1))
    if rows[0] == rows[1]:
        return ok("output heads", f"{rows[0]:,} rows in both, {rows[0] - needed:,} of them padding")
    if not setup.teacher_here:
        return ok("output heads", f"{rows[0]:,} rows (student), {rows[1]:,} (teacher, on the server); none is cut")
    if rows[0] > rows[1] and setup.config.use_vllm:
        return Finding(
            "output heads", "warning", heads_in_words(*rows),
            "vLLM loads the student with its larger head. Save the student once with the smaller one "
            f"(resize_token_embeddings({rows[1]})) and name that folder.",
        )  # fmt: skip
    return ok("output heads", heads_in_words(*rows))


def end_tokens(setup: Setup) -> Finding:
    """What ends the teacher's responses ends the student's: else rollouts run on where the teacher would stop."""
    ours, theirs = (model.end_tokens for model in setup.pair)
    name = "end tokens"
    if not ours:
        return Finding(name, "error", "the student has none", f"Set eos_token_id: {theirs} in its generation config.")
    only_theirs, only_ours = sorted({*theirs} - {*ours}), sorted({*ours} - {*theirs})
    if only_theirs:
        return Finding(
            name, "error",
            f"the teacher ends at {_named(setup.teacher, theirs)}, the student at {_named(setup.student, ours)}: it "
            f"would write on after {_named(setup.teacher, only_theirs)}",
            f'Set "eos_token_id": {sorted({*ours, *theirs})} in the student\'s generation_config.json.',
        )  # fmt: skip
    if only_ours:
        return Finding(
            name, "warning",
            f"the student also ends at {_named(setup.student, only_ours)}, where the teacher does not",
            f'Set "eos_token_id": {theirs} in the student\'s generation_config.json, unless you mean it.',
        )  # fmt: skip
    return ok(name, f"both end at {_named(setup.student, ours)}")


def special_tokens(setup: Setup) -> Finding:
    """Beginning, end and padding, as tokenizers and generation configs name them."""
    differ = []
    for what in ("bos_token", "eos_token", "pad_token"):
        ours, theirs = (getattr(model.tokenizer, what) for model in setup.pair)
        if ours != theirs:
            differ.append(f"{what}: {ours!r} (student), {theirs!r} (teacher)")
    for model in setup.pair:
        declared, own = model.generation.pad_token_id, model.tokenizer.pad_token_id
        if declared is not None and own is not None and declared != own:
            differ.append(f"{model.role}'s pad token: {own} (tokenizer), {declared} (generation config)")
    pad = setup.student.tokenizer.pad_token
    note = (
        "no pad token: the end token stands in" if pad is None
        else f"pad and end are both {pad!r}: masks are carried, not read off the ids"
        if pad == setup.student.tokenizer.eos_token
        else f"pad {pad!r}, end {setup.student.tokenizer.eos_token!r}"
    )  # fmt: skip
    if differ:
        return Finding(
            "special tokens", "warning", "; ".join(differ),
            "The student's are used for both. If the teacher's are the right ones, save its tokenizer into the "
            "student's folder.",
        )  # fmt: skip
    return ok("special tokens", f"the same in both; {note}")


def _named(model: Described, ids: Sequence[int]) -> str:
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids) or "nothing"
