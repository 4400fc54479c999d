"""`topd generate`: from names to a teacher and prompts. `topd warmstart` is in `cli/warmstart.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from topd.cli.arguments import json_object
from topd.errors import TOPDError
from topd.runs.sole_writer import sole_writer


def add_generate(commands: Any) -> None:
    """The command's options."""
    generate = commands.add_parser("generate", help="teacher solutions for prompts, for the warm start (stage 1)")
    generate.add_argument("--teacher", required=True, help="folder, Hub name, embedded one, or the server's model name")
    generate.add_argument(
        "--data",
        required=True,
        help="prompts: file, folder or Hub dataset, as for topd train; or `embedded`, `embedded-long`",
    )
    generate.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    generate.add_argument("--limit", type=int, help="use only the first so many prompts")
    generate.add_argument(
        "--out", type=Path, required=True,
        help=".jsonl or .parquet file; run again to go on after an interruption",
    )  # fmt: skip
    generate.add_argument("--samples", type=int, default=1, help="responses to each prompt (default: 1, the paper's)")
    generate.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6, the paper's)")
    generate.add_argument("--top-p", type=float, default=0.95, help="(default: 0.95, the paper's)")
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        help="of a response (default: 16384, the paper's; embedded: 96, embedded-long: 224)",
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--filter", choices=("math", "integer", "embedded"),
        help="keep only responses with the right answer, by this rule (default: keep all, as the paper)",
    )  # fmt: skip
    generate.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON",
        help="for prompts that are messages, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip
    generate.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="in this process")
    generate.add_argument("--batch", type=int, help="responses decoded, and kept, together (default: 32; vllm: 256)")
    generate.add_argument("--tensor-parallel", type=int, default=1, help="GPUs for vllm (default: %(default)s)")
    generate.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 (default: %(default)s)")
    generate.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server instead; --teacher is the name it serves"
    )
    generate.add_argument(
        "--server-key-env", metavar="NAME", help="environment variable that holds the server's API key"
    )
    generate.add_argument(
        "--concurrency", type=int, default=64, help="requests to a server at a time (default: %(default)s)"
    )
    generate.set_defaults(run=run_generate_command)


def run_generate_command(options: argparse.Namespace) -> None:
    """Check, load, generate."""
    _check(options)
    from topd.cli.arguments import prompts
    from topd.cli.eval import load_engine
    from topd.evaluation.responses import Sampling
    from topd.runs.quiet import quieten
    from topd.warmstart.generate import GenerateRun, run_generate

    quieten()
    rows = prompts(options.data, options.split, options.limit)
    if options.filter and not all(row.get("answer") for row in rows):
        raise TOPDError("--filter needs an answer in every row of --data.")
    sampling = Sampling(
        options.temperature, options.top_p, options.max_new_tokens, options.seed, options.chat_template_kwargs
    )
    engine, model, _ = load_engine(options.teacher, options, with_reasoning=True)
    run = GenerateRun(model, f"{options.data} {options.split}", options.samples, options.filter, sampling)
    with sole_writer(options.out.parent, f"_{options.out.stem}.lock"):
        run_generate(run, engine, rows, options.out)


def _check(options: argparse.Namespace) -> None:
    """Fill in what depends on the data, refuse what cannot be."""
    if options.max_new_tokens is None:
        from topd.evaluation.benchmarks import BENCHMARKS

        known = BENCHMARKS.get(options.data)
        options.max_new_tokens = known.max_new_tokens if known else 16384
    for name in ("samples", "max_new_tokens", "limit", "batch", "concurrency", "tensor_parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TOPDError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise TOPDError("--temperature must not be negative, --top-p must be in (0, 1].")
    if options.samples > 1 and options.temperature == 0:
        raise TOPDError("Greedy responses (--temperature 0) are all the same: leave --samples at 1.")
    if options.out.suffix not in (".jsonl", ".parquet"):
        raise TOPDError(f"--out {options.out}: give a name that ends in .jsonl or .parquet.")
