"""The problems: benchmarks known by name, and any file or Hub dataset of problems with answers.

This project contains no benchmark problems: they come from the Hub or from your own file (`--benchmark aime24=FILE`).
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from topd.embedded.task import DATA, make_problems
from topd.errors import DataError, TOPDError
from topd.evaluation.answers import LM_EVAL_PROMPT, Rule, can_be_right
from topd.loading.data import load_prompts

T = TypeVar("T")
PromptStyle = Literal["boxed", "lm-eval"]
"""boxed: ours. lm-eval: prompt and answer extraction of lm-evaluation-harness, which the paper used."""
LM_EVAL_BENCHMARKS = ("aime24", "aime25", "hmmt25")
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BOXED = "{problem}" + INSTRUCTION.replace("{}", "{{}}")
"""The instruction that Qwen's model cards recommend for mathematics (our choice: the paper gives no prompt)."""


@dataclass(frozen=True)
class Benchmark:
    """A known set of problems.

    Attributes:
        source: Hub name, with the configuration after a colon; None for the embedded task.
        split: of the Hub dataset.
        size: number of problems; a source with another number is refused.
        rule: how answers are compared.
        template: the prompt; {problem} stands for the problem's text.
        max_new_tokens: default length limit of a response (our choice: the paper gives no length).
    """

    source: str | None
    split: str
    size: int
    rule: Rule
    template: str = BOXED
    max_new_tokens: int = 16384


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 30, "integer"),
    "aime25": Benchmark("MathArena/aime_2025", "train", 30, "integer"),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "train", 30, "math"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", 500, "math"),
    "gsm8k": Benchmark("openai/gsm8k:main", "test", 1319, "math"),
    "embedded": Benchmark(None, "held out", 1000, "embedded", "{problem}", 96),
    "embedded-long": Benchmark(None, "held out", 1000, "embedded", "{problem}", 224),
    "lm-held-out": Benchmark("lm-held-out", "test", 500, "gsm8k", "{problem}", 224),
    "lm-unseen": Benchmark("lm-unseen", "test", 500, "gsm8k", "{problem}", 224),
    "lm-tuning": Benchmark("lm-tuning", "test", 300, "gsm8k", "{problem}", 224),
}
EMBEDDED_SEED = 1_000_000
"""Seed of the embedded task's held-out problems, which are those of `topd demo` with seed 0."""


@dataclass(frozen=True)
class Problem:
    """One problem: an id that changes with its text, the prompt (text or messages) and the wanted answer."""

    id: str
    prompt: Any
    answer: str


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one benchmark, in their order."""

    name: str
    rule: Rule
    max_new_tokens: int
    problems: tuple[Problem, ...]


def load_benchmark(
    name: str, *, limit: int | None = None, split: str = "test", rule: Rule = "math", style: PromptStyle = "boxed",
    option: str = "--benchmark",
) -> ProblemSet:  # fmt: skip
    """The problems of a benchmark.

    `name`: a known name; "NAME=SOURCE", a known benchmark from your own file or dataset, or your own name for it; or
    just a source: a JSONL, JSON, CSV or Parquet file, a folder of `save_to_disk`, or a Hub dataset, with `problem` (or
    `question`, `prompt`) and `answer`. `limit`: keep only the first N. `split`: of your own Hub dataset. `rule`: for
    your own problems. `style`: of the prompt and of extracting answers; "lm-eval" for `LM_EVAL_BENCHMARKS` only.
    `option`: the user's option that names the benchmark, for messages. Raises `TOPDError` if the source cannot be read,
    a problem has no answer or one that the rule never accepts, a known benchmark has another size than expected, or the
    style does not fit the benchmark.
    """
    given = label_and_file(name)  # the label also names files of records
    stem = Path(name.replace(":", "-")).name.lstrip(".").split(".")[0]
    label = name if name in BENCHMARKS else given[0] if given else stem
    if style == "lm-eval" and label not in LM_EVAL_BENCHMARKS:
        raise TOPDError(
            f"--prompt-style lm-eval is for {', '.join(LM_EVAL_BENCHMARKS)}, not for {label}. To use a file with the "
            "problems of one of them: --benchmark aime24=FILE."
        )
    known = BENCHMARKS.get(label)
    if known is None or name != label:
        rows = _rows(given[1] if given else name, split, name, option)
    elif known.source is None:
        problems = make_problems(limit or known.size, EMBEDDED_SEED, held_out=True, level=DATA[label])
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    else:
        rows = _rows(known.source, known.split, name, option)
        if len(rows) != known.size:
            raise TOPDError(
                f"{known.source} has {len(rows)} problems where {label} has {known.size}: the dataset was changed. "
                f"Use a copy of the original: {option} {label}=FILE."
            )
    known = known or Benchmark(name, split, len(rows), rule)
    if style == "lm-eval":
        known = replace(known, template=LM_EVAL_PROMPT, rule="lm_eval")
        rows = [_as_lm_eval_has_it(row, name) for row in rows]
    numbered = [_problem(number, row, known.template) for number, row in enumerate(rows[:limit], 1)]
    unread = [number for number, each in enumerate(numbered, 1) if not can_be_right(each.answer, known.rule)]
    if unread:
        raise TOPDError(
            f"{option} {name}: the rule {known.rule} cannot read {len(unread)} of {len(numbered)} answers as numbers, "
            f"the first is {numbered[unread[0] - 1].answer[:40]!r} of number {unread[0]}. Correct the answers, or for "
            "your own problems use the rule math."
        )
    return ProblemSet(label, known.rule, known.max_new_tokens, tuple(numbered))


def label_and_file(name: str) -> tuple[str, str] | None:
    """The parts of "LABEL=SOURCE"; None for any other name. A label names a folder or files, so it is never ".."."""
    match = re.fullmatch(r"([\w-][\w.-]*)=(.+)", name)
    return (match[1], match[2]) if match else None


def _rows(source: str, split: str, name: str, option: str) -> list[dict[str, Any]]:
    try:
        rows = list(load_prompts(source, split=split))
    except DataError as error:
        raise TOPDError(
            f"{option} {name}: {error} Known benchmarks are {', '.join(BENCHMARKS)}. Without a network, use a file "
            f"with `problem` and `answer`: {option} NAME=FILE."
        ) from error
    missing = [number for number, row in enumerate(rows, 1) if not row.get("answer")]
    if missing:
        raise TOPDError(
            f"{option} {name}: {len(missing)} of {len(rows)} problems have no `answer`, the first is number "
            f"{missing[0]}. Write the answers, or remove these problems."
        )
    return rows


def _as_lm_eval_has_it(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A problem without our instruction, which some files contain, and an answer without leading zeros.

    The harness compares strings, and its datasets have no leading zeros.
    """
    prompt, answer = row["prompt"], row["answer"]
    text = prompt.removesuffix(INSTRUCTION) if isinstance(prompt, str) else ""
    if not text or r"\boxed" in text:
        raise TOPDError(
            f"--benchmark {name}: with --prompt-style lm-eval, problems must be text without an instruction of their "
            f"own. Remove the instruction from the problem that begins {str(prompt)[:60]!r}."
        )
    return {"prompt": text, "answer": str(int(answer)) if answer.strip().isdigit() else answer}


def text_of(prompt: Any) -> str:
    """A prompt's text; of messages the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def question(prompt: Any) -> str:
    """A prompt's text without the instruction that asks for a box."""
    return text_of(prompt).removesuffix(INSTRUCTION).strip()


def spread(items: list[T], count: int) -> list[T]:
    """`count` of the items at equal distances, or all if there are fewer."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else items


def _problem(number: int, row: dict[str, Any], template: str) -> Problem:
    prompt, answer = row["prompt"], row["answer"]
    if isinstance(prompt, str) and r"\boxed" not in prompt:  # some files have the instruction in the problem
        prompt = template.format(problem=prompt)
    answer = answer.strip()
    digest = hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()
    return Problem(f"{number:04d}-{digest[:8]}", prompt, answer)
