"""`topd eval`: from names to engines, benchmarks and tables. The evaluation is in `evaluation/`."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from topd.cli.engines import add_engine_options, add_sampling_options, check_sampling, load_engine
from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer
from topd.visible import visible

EMBEDDED_MODEL = "embedded:long-student"


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--model", "--student", "--model-name-or-path", nargs="+", action="extend", metavar="M",
        help="folder (of a LoRA adapter too), Hub name or embedded model; LABEL=M names it in tables. Several models "
        f"are compared with the first (default: {EMBEDDED_MODEL})",
    )  # fmt: skip
    what.add_argument(
        "--benchmark", "--data", nargs="+", action="extend", metavar="B",
        help="aime24, aime25, hmmt25, math500, gsm8k, embedded, embedded-long, lm-held-out, lm-unseen, lm-tuning, or a "
        "file or Hub dataset with `problem` and `answer`; LABEL=FILE names it, aime24=FILE reads a "
        "known benchmark from a file (default: embedded-long)",
    )  # fmt: skip
    what.add_argument("--split", default="test", help="split of your own Hub dataset (default: %(default)s)")
    what.add_argument(
        "--rule", choices=("math", "integer", "gsm8k"), default="math",
        help="how answers of your own problems are compared (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--prompt-style", choices=("boxed", "lm-eval"), default="boxed",
        help="boxed: ours. lm-eval: prompt and answer extraction of lm-evaluation-harness, as the paper used, for "
        "aime24, aime25 and hmmt25 (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--limit", type=int, help="use only the first N problems of each benchmark")
    how = parser.add_argument_group("sampling (the defaults are our choice: the paper gives none)")
    add_sampling_options(how, samples=5)
    how.add_argument("--raw", action="store_true", help="send prompts as plain text, without the chat template")
    add_engine_options(parser.add_argument_group("inference engine"), "--model")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", type=Path, default=Path("runs/eval"),
        help="output folder, one subfolder per model; run again to resume or add samples (default: %(default)s)",
    )  # fmt: skip
    results.add_argument(
        "--compare", nargs="+", type=Path, metavar="DIR",
        help="only compare finished evaluations, each with the first; needs no model",
    )  # fmt: skip
    results.add_argument(
        "--gain", type=float, default=4.4,
        help="gain in points for the power analysis (default: the paper's 4.4)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    check_sampling(options)
    if not options.gain > 0:
        raise TOPDError("--gain must be above 0.")
    if options.compare:
        if options.model or options.benchmark:
            raise TOPDError("--compare reads finished evaluations: leave --model and --benchmark out, or --compare.")
        _compare(options.compare, options, console)
        return
    from topd.evaluation.benchmarks import load_benchmark
    from topd.evaluation.results import RESULT, write_result
    from topd.evaluation.run import labelled_models
    from topd.evaluation.tables import result_table
    from topd.runs.console import silence_libraries

    silence_libraries()
    models = labelled_models(options.model or [EMBEDDED_MODEL])
    sets = [
        load_benchmark(name, limit=options.limit, split=options.split, rule=options.rule, style=options.prompt_style)
        for name in options.benchmark or ["embedded-long"]
    ]
    labels = [each.name for each in sets]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise TOPDError(f"Two benchmarks have the same label ({twice}). Name them: --benchmark LABEL=FILE OTHER=FILE.")
    folders = [options.out / label for label in models]
    for (label, source), folder in zip(models.items(), folders, strict=True):
        console.print(visible(f"{label} ({source})"), markup=False)
        with sole_writer(folder):
            _evaluate(source, sets, options, folder, console)
            console.print(result_table(write_result(folder)))
        console.print(
            f"Results: {folder / RESULT}. Every response is in the same folder.", soft_wrap=True, markup=False
        )
    if len(folders) > 1:
        _compare(folders, options, console)


def _evaluate(source: str, sets: list[Any], options: argparse.Namespace, folder: Path, console: Any) -> None:
    from topd.evaluation.engines import Sampling
    from topd.evaluation.run import EvalRun, run_benchmark

    engine, model, has_template = load_engine(source, options)
    sampling = Sampling(options.temperature, options.top_p, 0, options.seed, options.chat_template_kwargs)
    for each in sets:
        length = options.max_new_tokens or each.max_new_tokens
        chat = has_template and not options.raw and each.rule != "embedded"
        benchmark_run = EvalRun(model, each, replace(sampling, max_new_tokens=length), chat)
        run_benchmark(benchmark_run, engine, options.samples, folder, console)


def _compare(folders: list[Path], options: argparse.Namespace, console: Any) -> None:
    from topd.evaluation.compare import COMPARISON, compare, evaluation_folders
    from topd.evaluation.tables import comparison_tables

    console.print(comparison_tables(compare(evaluation_folders(folders), options.out, options.gain / 100)))
    console.print(f"Results: {options.out / COMPARISON}.", soft_wrap=True, markup=False)
    in_report = [options.out] if set(folders) <= set(options.out.iterdir()) else folders
    first, *others = map(str, in_report)
    command = shlex.join(["topd", "report", first, *(["--compare", *others] if others else [])])
    console.print(f"As a page: {command}", soft_wrap=True, markup=False, highlight=False)
