"""`topd eval`: from names to engines, benchmarks and tables. What is computed is in `evaluation/`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from topd.cli.arguments import json_object
from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer
from topd.visible import visible

EMBEDDED_MODEL = "embedded:long-student"


def add_eval(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "eval", help="accuracy on benchmarks with intervals, and models compared on the same problems"
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--model", nargs="+", action="extend", metavar="M",
        help="folder, also of a LoRA adapter, Hub name or embedded one; LABEL=M names it in tables. Several are "
        f"compared with the first (default: {EMBEDDED_MODEL})",
    )  # fmt: skip
    what.add_argument(
        "--benchmark", nargs="+", action="extend", metavar="B",
        help="aime24, aime25, hmmt25, math500, gsm8k, embedded, embedded-long, or a file or Hub dataset with "
        "`problem` and `answer`; LABEL=FILE names it, aime24=FILE takes a known one from a file (default: "
        "embedded-long)",
    )  # fmt: skip
    what.add_argument("--split", default="test", help="of a Hub dataset of yours (default: %(default)s)")
    what.add_argument(
        "--rule", choices=("math", "integer"), default="math", help="of a set of yours (default: %(default)s)"
    )
    what.add_argument(
        "--prompt-style", choices=("boxed", "lm-eval"), default="boxed",
        help="boxed: ours. lm-eval: prompt and answer extraction of lm-evaluation-harness, as the paper used, for "
        "aime24, aime25 and hmmt25 (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    how = parser.add_argument_group("how responses are sampled (the defaults are our choice: the paper gives none)")
    how.add_argument("--samples", type=int, default=5, help="of each problem (default: %(default)s)")
    how.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: %(default)s)")
    how.add_argument("--top-p", type=float, default=0.95, help="share that is sampled from (default: %(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, help="of a response (default: 16384; embedded: 96, embedded-long: 224)"
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON",
        help="such as '{\"enable_thinking\": false}', which is the paper's",
    )  # fmt: skip
    how.add_argument("--raw", action="store_true", help="prompts as plain text, without the chat template")
    where = parser.add_argument_group("what responds")
    where.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="in this process")
    where.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server instead; --model is the name it serves"
    )
    where.add_argument("--server-key-env", metavar="NAME", help="environment variable that holds the server's API key")
    where.add_argument("--batch", type=int, help="responses decoded, and kept, together (default: 32; vllm: 256)")
    where.add_argument(
        "--concurrency", type=int, default=64, help="requests to a server at a time (default: %(default)s)"
    )
    where.add_argument("--tensor-parallel", type=int, default=1, help="GPUs for vllm (default: %(default)s)")
    where.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 (default: %(default)s)")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", type=Path, default=Path("runs/eval"),
        help="folder, one for each model in it; run again to go on, or to add samples (default: %(default)s)",
    )  # fmt: skip
    results.add_argument(
        "--compare", nargs="+", type=Path, metavar="DIR",
        help="only compare finished evaluations, the first with each other one; needs no model",
    )  # fmt: skip
    results.add_argument(
        "--gain",
        type=float,
        default=4.4,
        help="points, for the number of problems that would be needed (default: the paper's 4.4)",
    )
    parser.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> None:
    """Check, load, sample, tell; or only compare."""
    from rich.console import Console

    console = Console()
    _check(options)
    if options.compare:
        _compare(options.compare, options, console)
        return
    from topd.evaluation.benchmarks import load_benchmark
    from topd.evaluation.models import labelled_models
    from topd.evaluation.results import RESULT, write_result
    from topd.evaluation.tables import result_table
    from topd.runs.quiet import quieten

    quieten()
    models = labelled_models(options.model or [EMBEDDED_MODEL])
    sets = [
        load_benchmark(name, limit=options.limit, split=options.split, rule=options.rule, style=options.prompt_style)
        for name in options.benchmark or ["embedded-long"]
    ]
    folders = [options.out / label for label in models]
    for (label, source), folder in zip(models.items(), folders, strict=True):
        console.print(visible(f"{label} ({source})"), markup=False)
        with sole_writer(folder):
            _evaluate(source, sets, options, folder, console)
            console.print(result_table(write_result(folder)))
        console.print(f"{folder / RESULT} holds the figures; every response is beside it.", soft_wrap=True)
    if len(folders) > 1:
        _compare(folders, options, console)


def _evaluate(source: str, sets: list[Any], options: argparse.Namespace, folder: Path, console: Any) -> None:
    """Sample one model on all benchmarks."""
    from topd.evaluation.responses import Sampling
    from topd.evaluation.run import EvalRun, run_benchmark

    engine, model, has_template = load_engine(source, options)
    sampling = Sampling(options.temperature, options.top_p, 0, options.seed, options.chat_template_kwargs)
    for each in sets:
        length = options.max_new_tokens or each.max_new_tokens
        chat = has_template and not options.raw and each.rule != "embedded"
        run = EvalRun(model, each, replace(sampling, max_new_tokens=length), chat)
        run_benchmark(run, engine, options.samples, folder, console)


def load_engine(
    source: str, options: argparse.Namespace, with_reasoning: bool = False
) -> tuple[Any, dict[str, Any], bool]:
    """What responds, what is recorded of it, and whether it has a chat template.

    Args:
        with_reasoning: see `ServerEngine`.
    """
    from topd.evaluation.models import fingerprint

    model: dict[str, Any] = {"model": source, "engine": options.engine, "dtype": options.dtype}
    if options.server:
        from topd.evaluation.server_engine import LIMITS, ServerEngine

        limits = replace(LIMITS, concurrency=options.concurrency)
        server = ServerEngine(options.server, source, limits, options.server_key_env, with_reasoning)
        return server, model | {"engine": "server", "dtype": None}, True
    if options.engine == "vllm":
        engine, tokenizer, config = _vllm(source, options)
    else:
        from topd.evaluation.local_engine import LocalEngine
        from topd.loading.models import loaded_model

        loaded, tokenizer = loaded_model(source, options.dtype)
        engine, config = LocalEngine(loaded, tokenizer, options.batch or 32), loaded.config
    model["fingerprint"] = fingerprint(source) or config._commit_hash
    return engine, model, tokenizer.chat_template is not None


def _vllm(source: str, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from topd.embedded.pair import resolve_model
    from topd.evaluation.vllm_engine import VllmEngine
    from topd.loading.by_name import load_by_name
    from topd.loading.models import is_adapter

    folder = resolve_model(source)
    if is_adapter(folder):
        raise TOPDError(f"{folder} holds an adapter, which --engine vllm does not take here: leave --engine out.")
    tokenizer = load_by_name("tokenizer", folder, AutoTokenizer.from_pretrained)
    config = load_by_name("models", folder, AutoConfig.from_pretrained, folder)
    size = options.tensor_parallel
    engine = VllmEngine(folder, tokenizer, config, options.batch or 256, dtype=options.dtype, tensor_parallel_size=size)
    return engine, tokenizer, config


def _compare(folders: list[Path], options: argparse.Namespace, console: Any) -> None:
    from topd.evaluation.compare import COMPARISON, compare, evaluation_folders
    from topd.evaluation.tables import comparison_tables

    console.print(comparison_tables(compare(evaluation_folders(folders), options.out, options.gain / 100)))
    console.print(f"{options.out / COMPARISON} holds the figures.", soft_wrap=True)
    shown = [options.out] if set(folders) <= set(options.out.iterdir()) else folders
    first, *others = map(str, shown)
    command = shlex.join(["topd", "report", first, *(["--compare", *others] if others else [])])
    console.print(f"As a page: {command}", soft_wrap=True, markup=False, highlight=False)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be."""
    for name in ("samples", "max_new_tokens", "limit", "batch", "concurrency", "tensor_parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TOPDError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.gain <= 0:
        raise TOPDError("--temperature must not be negative, --top-p must be in (0, 1], --gain above 0.")
    if options.temperature == 0 and options.samples > 1:
        raise TOPDError("At temperature 0 all samples of a problem are the same: give --samples 1, or a temperature.")
    if options.compare and (options.model or options.benchmark):
        raise TOPDError("--compare reads finished evaluations: leave --model and --benchmark out, or --compare.")
