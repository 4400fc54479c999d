"""`topd generate`: from names to a teacher and prompts. The generation is in `warmstart/`."""

import argparse
from pathlib import Path

from topd.cli.data_options import add_form_options, form_of, source_of
from topd.cli.engines import add_engine_options, add_sampling_options, check_sampling, load_engine
from topd.cli.options import prompts
from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="folder, Hub name, embedded model, or the server's model name")
    parser.add_argument(
        "--data", required=True, nargs="+",
        help="prompts: files, folder or Hub dataset, as for topd train; or `embedded`, `embedded-long`",
    )  # fmt: skip
    add_form_options(parser)
    parser.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first N prompts")
    parser.add_argument(
        "--out", type=Path, required=True, help=".jsonl or .parquet file; run again to resume after an interruption"
    )
    add_sampling_options(parser, samples=1, paper=", the paper's")
    parser.add_argument(
        "--filter", choices=("math", "integer", "gsm8k", "embedded"),
        help="keep only responses with the right answer, by this rule (default: keep all, as the paper)",
    )  # fmt: skip
    add_engine_options(parser, "--teacher")


def run(options: argparse.Namespace) -> None:
    from topd.loading.data import source_name

    source = source_of(options.data)
    options.data = source_name(source)
    if options.max_new_tokens is None:
        from topd.evaluation.benchmarks import BENCHMARKS

        known = BENCHMARKS.get(options.data)
        options.max_new_tokens = known.max_new_tokens if known else 16384
    check_sampling(options)
    if options.out.suffix not in (".jsonl", ".parquet"):
        raise TOPDError(f"--out {options.out}: give a name that ends in .jsonl or .parquet.")
    from topd.evaluation.engines import Sampling
    from topd.runs.console import silence_libraries
    from topd.warmstart.generate import GenerateRun, run_generate

    silence_libraries()
    rows = prompts(source, options.split, options.limit, form=form_of(options))
    if options.filter and not all(row.get("answer") for row in rows):
        raise TOPDError("--filter needs an answer in every row of --data.")
    sampling = Sampling(
        options.temperature, options.top_p, options.max_new_tokens, options.seed, options.chat_template_kwargs
    )
    with sole_writer(options.out.parent, f"_{options.out.stem}.lock"):
        engine, model, _ = load_engine(options.teacher, options, with_reasoning=True)
        generate_run = GenerateRun(model, f"{options.data} {options.split}", options.samples, options.filter, sampling)
        run_generate(generate_run, engine, rows, options.out)
