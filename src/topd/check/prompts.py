"""The data as the models read it: prompts, number of steps, context lengths."""

import statistics

from topd.check.findings import Finding, fails, ok, warns
from topd.check.setup import Setup
from topd.loading.dataset_checks import step_size
from topd.loading.prompts import prompt_text
from topd.loading.tokenizers import check_context


def sample(setup: Setup) -> Finding:
    """The first prompt with its special tokens, the lengths, and anything suspicious."""
    tokenizer = setup.student.tokenizer
    rows = list(setup.sample.values())
    lengths = [len(ids) for ids in rows]
    answers = sum(answer is not None for answer in setup.answers)
    first = str(tokenizer.decode(rows[0]))
    if not min(lengths):
        return fails(
            f"{lengths.count(0):,} of {len(rows):,} prompts that were tokenized have no tokens",
            "The chat template renders them to nothing: fix it (chat_template.jinja), or give prompts as text.",
        )
    found = (
        f"{len(setup.prompts):,} prompts ({'messages' if setup.conversational else 'text'}), {answers:,} with answers; "
        f"{min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}; the first reads "
        f"{shown(first)}"
    )
    if beginning := _beginning(setup):
        return warns(f"{beginning[0]}; {found}", beginning[1])
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in rows) if tokenizer.unk_token_id is not None else 0
    if unknown:
        return warns(
            f"{unknown / sum(lengths):.1%} of the prompts' tokens are {tokenizer.unk_token!r}; {found}",
            "The tokenizer does not know what the data is written in: choose another pair, or clean the data.",
        )
    return ok(found)


def _beginning(setup: Setup) -> tuple[str, str] | None:
    """What is wrong with the first prompt's BOS, and the remedy; None if nothing is."""
    tokenizer, row = setup.student.tokenizer, next(iter(setup.sample))
    bos, name, prompt = tokenizer.bos_token_id, repr(tokenizer.bos_token), setup.prompts[row]
    text = prompt_text(tokenizer, prompt, setup.template_options)
    plain = tokenizer(text, add_special_tokens=not setup.conversational)["input_ids"]
    if bos is not None and plain[:2] == [bos, bos]:
        return (
            f"the first prompt begins with {name} twice; one is removed",
            "Both the template (or the data) and the tokenizer write it: remove it from one of them.",
        )
    if bos is not None and setup.conversational and plain[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        return (
            f"the chat template does not begin with {name}, which the tokenizer puts before text",
            "If the models were trained with it, begin the template with {{ bos_token }}.",
        )
    return None


def shown(text: str) -> str:
    return f"{text if len(text) <= 240 else text[:160] + ' ... ' + text[-60:]!r}"


def batch(setup: Setup) -> Finding:
    """Number of steps. Only whole batches are trained on, so there must be prompts for one."""
    config = setup.config
    (step, found), prompts = step_size(config), len(setup.prompts)
    if prompts < step:
        return fails(
            f"{found}, the data has {prompts:,}: there would be no step",
            "Add prompts, or lower --per_device_train_batch_size or --gradient_accumulation_steps.",
        )
    updates = config.updates_per_generation
    steps = config.max_steps if config.max_steps > 0 else int(config.num_train_epochs * (prompts // step) * updates)
    return ok(f"{found}; {steps:,} steps, {steps / updates * step / prompts:.2g} epochs")


def context(setup: Setup) -> Finding:
    """Raises `ContextError` unless prompt + response + window fit both models' contexts."""
    config, tokenizer = setup.config, setup.student.tokenizer
    longest = max(setup.sample.values(), key=len)
    response, window = config.max_completion_length or 0, config.window_length if config.looks_ahead else 0
    row, theirs = max(setup.teacher_sample.items(), key=lambda item: len(item[1]))
    what = f"The teacher's prompt (row {row}) of" if setup.prompted else "A prompt of"
    for model, ids, whose in zip(setup.pair, (longest, theirs), ("A prompt of", what), strict=True):
        configs = {model.role: model.config}
        check_context(len(ids), str(tokenizer.decode(ids)), response, window, configs, what=whose)
    limits = " and ".join(
        f"{getattr(model.text_config, 'max_position_embeddings', None) or 'no limit'} ({model.role})"
        for model in setup.pair
    )
    needed = len(longest) + response + window
    own = f"; the teacher's own prompt has {len(theirs)}" if setup.prompted else ""
    return ok(f"{len(longest)} prompt + {response} response + {window} window = {needed} tokens of {limits}{own}")
