"""One model on one benchmark: every sample is saved as soon as it is ready. And the names of models."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from topd.embedded.pair import resolve_model
from topd.errors import TOPDError
from topd.evaluation.answers import verdict
from topd.evaluation.benchmarks import ProblemSet, label_and_file
from topd.evaluation.engines import Engine, Request, Response, Sampling, as_chat
from topd.evaluation.equivalence import check_installed
from topd.evaluation.results import RECORD_KEYS, SAMPLES, SETTINGS, benchmarks_in
from topd.loading.adapters import ADAPTER_CONFIG
from topd.runs.console import progress
from topd.runs.files import append_records, read_object, write_json
from topd.runs.provenance import versions
from topd.runs.records import earlier_records

_WEIGHTS = (
    "*.safetensors", "*.bin", "*.gguf", "config.json", ADAPTER_CONFIG, "tokenizer.json", "chat_template.jinja",
)  # fmt: skip
_ENDS = 1 << 20
"""Bytes read at each end of a file. Training changes them, and large files stay fast."""


def label_and_source(name: str) -> tuple[str, str]:
    """Split "LABEL=SOURCE"; the label of a plain source is its last part (`TOPDError` if it has none)."""
    if given := label_and_file(name):
        return given
    label = Path(name.replace(":", "-")).name
    if label in ("", "..") and not (label := Path(os.path.abspath(name)).name):
        raise TOPDError(f"--model {name}: give it a name, as in --model my-model={name}.")
    return label, name


def labelled_models(names: list[str]) -> dict[str, str]:
    """Label -> source. Raises `TOPDError` if two models would have the same label."""
    pairs = [label_and_source(name) for name in names]
    models = dict(pairs)
    if len(models) < len(pairs):
        raise TOPDError(
            f"Two models have the same label ({', '.join(label for label, _ in pairs)}). Name them: "
            "--model opd=runs/a/checkpoint-100 --model topd=runs/b/checkpoint-100."
        )
    return models


def fingerprint(source: str) -> str | None:
    """Digest of a model's folder: names, sizes and both ends of its files. None for a Hub name."""
    folder = Path(resolve_model(source))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)}):
        if file.name == ADAPTER_CONFIG:  # PEFT saves the set of target modules in an order that changes
            lines = (line.strip(" ,") for line in file.read_text(encoding="utf-8").splitlines())
            digest.update("\n".join([file.name, *sorted(lines)]).encode())
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS))
            content.seek(max(0, size - _ENDS))
            digest.update(content.read(_ENDS))
    return digest.hexdigest()[:16]


SAMPLE_STRIDE = 100_000
"""A response's number is `sample * SAMPLE_STRIDE + problem`, independent of how many there are."""
DECISIVE = ("torch", "transformers", "vllm", "math-verify")
"""Packages that can change a response or its verdict."""


@dataclass(frozen=True)
class EvalRun:
    """What the samples of one file depend on. Their number is not part of it, so that more can be added.

    Attributes:
        model: record of the model: name, fingerprint, engine, dtype.
        chat: whether text prompts go through the chat template as a user message.
    """

    model: dict[str, Any]
    problem_set: ProblemSet
    sampling: Sampling
    chat: bool

    def settings(self) -> dict[str, Any]:
        """The settings file: prompts as digests (see `Problem.id`), answers in full."""
        problems = [{"id": problem.id, "answer": problem.answer} for problem in self.problem_set.problems]
        named = {"benchmark": self.problem_set.name, "rule": self.problem_set.rule, "chat": self.chat}
        return {"version": 1, **named, **self.model, **asdict(self.sampling), "problems": problems}


def run_benchmark(run: EvalRun, engine: Engine, samples: int, folder: Path, console: Console) -> None:
    """Sample and judge the missing ones of `samples` responses per problem.

    Raises `TOPDError` if the folder holds samples with other settings, or the engine cannot respond.
    """
    name, problems = run.problem_set.name, run.problem_set.problems
    file, settings_file = folder / f"{name}{SAMPLES}", folder / f"{name}{SETTINGS}"
    _refuse_other_model(folder, name, run.model)
    requests = requests_of(run.problem_set, range(len(problems)), samples, run.chat)
    settings = run.settings()
    records = earlier_records(file, settings_file, settings, needs=RECORD_KEYS, may_change="")
    write_json(settings | {"versions": versions(DECISIVE)}, settings_file)
    places = {problem.id: place for place, problem in enumerate(problems)}
    done = {r["sample"] * SAMPLE_STRIDE + places[r["problem"]] for r in records if r["problem"] in places}
    missing = [request for request in requests if request.number not in done]
    console.print(
        f"{name}: {len(problems)} problems x {samples} samples of up to {run.sampling.max_new_tokens} tokens; "
        f"{len(requests) - len(missing)} of {len(requests)} are done."
    )
    if not missing:
        return
    if run.problem_set.rule == "math":
        check_installed()
    engine.check(missing, run.sampling)
    with progress(console, name, len(requests), len(requests) - len(missing)) as advance:
        new: list[dict[str, Any]] = []
        for batch in engine.respond(missing, run.sampling):
            fresh = [record_of(run.problem_set, number, response) for number, response in batch]
            append_records(fresh, file)
            new += fresh
            right, tokens = (sum(record[key] for record in new) for key in ("right", "tokens"))
            advance(len(batch), f"{right / len(new):.1%} right, {tokens} tokens")


def _refuse_other_model(folder: Path, name: str, model: dict[str, Any]) -> None:
    """Raise `TOPDError` if another benchmark in the folder was answered by another model: its mean would be of two."""
    for other in sorted(set(benchmarks_in(folder)) - {name}):
        before = read_object(folder / f"{other}{SETTINGS}", f"Delete it and the samples of {other} to sample anew.")
        known = before.get("fingerprint") and model.get("fingerprint")
        key = "fingerprint" if known else "model"
        if before.get(key) != model.get(key):
            raise TOPDError(
                f"In {folder}, {other} was answered by another model ({before.get('model')}). Give this one another "
                "name, as in --model NAME=SOURCE, or give another --out."
            )


def requests_of(problem_set: ProblemSet, places: Iterable[int], samples: int, chat: bool) -> list[Request]:
    """`samples` requests for each of the problems at these places; `chat` as in `EvalRun`."""
    asked = [(place, as_chat(problem_set.problems[place].prompt, chat)) for place in places]
    return [Request(sample * SAMPLE_STRIDE + place, prompt) for sample in range(samples) for place, prompt in asked]


def record_of(problem_set: ProblemSet, number: int, response: Response) -> dict[str, Any]:
    """The record of a response, judged."""
    sample, place = divmod(number, SAMPLE_STRIDE)
    problem = problem_set.problems[place]
    judged = verdict(response.text, problem.answer, problem_set.rule)
    return {"problem": problem.id, "sample": sample, **asdict(response), **asdict(judged)}
