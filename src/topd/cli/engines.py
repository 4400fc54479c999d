"""What responds in `topd eval` and `topd generate`: its options, and from them to an engine."""

import argparse
import math
from dataclasses import replace
from typing import Any

from topd.cli.options import check_at_least_one, json_object
from topd.errors import TOPDError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_sampling_options(parser: Any, samples: int, paper: str = "") -> None:
    """How responses are sampled. `paper`: behind defaults that are the paper's."""
    parser.add_argument(
        "--samples", type=int, default=samples, help=f"responses per problem or prompt (default: %(default)s{paper})"
    )
    parser.add_argument("--temperature", type=float, default=0.6, help=f"0: greedy (default: %(default)s{paper})")
    parser.add_argument("--top-p", type=float, default=0.95, help=f"nucleus sampling (default: %(default)s{paper})")
    parser.add_argument(
        "--max-new-tokens", type=int,
        help=f"length limit of a response (default: 16384{paper}; embedded: 96, embedded-long: 224)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--chat-template-kwargs", type=json_object, metavar="JSON",
        help="chat template arguments, such as '{\"enable_thinking\": false}', which is the paper's",
    )  # fmt: skip


def add_engine_options(parser: Any, model: str) -> None:
    """Where the model runs. `model`: the option that names it."""
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="local engine")
    parser.add_argument(
        "--server", metavar="URL", help=f"use an OpenAI-compatible server instead; {model} is the served model name"
    )
    parser.add_argument("--server-key-env", metavar="NAME", help="environment variable that holds the server's API key")
    parser.add_argument("--batch", type=int, help="responses decoded and saved together (default: 32; vllm: 256)")
    parser.add_argument("--concurrency", type=int, default=64, help="parallel server requests (default: %(default)s)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="number of GPUs for vllm (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model (default: %(default)s)")


def check_sampling(options: argparse.Namespace) -> None:
    """Raise `TOPDError` where a value is out of range."""
    check_at_least_one(options, "samples", "max_new_tokens", "limit", "batch", "concurrency", "tensor_parallel")
    if options.seed < 0:
        raise TOPDError("--seed must not be negative.")
    if not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise TOPDError("--temperature must not be negative, --top-p must be in (0, 1].")
    if options.temperature == 0 and options.samples > 1:
        raise TOPDError("At temperature 0 all samples of a problem are the same: give --samples 1, or a temperature.")


def load_engine(
    source: str, options: argparse.Namespace, with_reasoning: bool = False
) -> tuple[Any, dict[str, Any], bool]:
    """The engine, the record of its model, and whether it has a chat template. `with_reasoning`: see `ServerEngine`."""
    from topd.evaluation.run import fingerprint

    model: dict[str, Any] = {"model": source, "engine": options.engine, "dtype": options.dtype}
    if options.server:
        from topd.evaluation.server_engine import LIMITS, ServerEngine

        limits = replace(LIMITS, concurrency=options.concurrency)
        server = ServerEngine(options.server, source, limits, options.server_key_env, with_reasoning)
        return server, model | {"engine": "server", "dtype": None}, True
    if options.engine == "vllm":
        engine, tokenizer, config = _vllm(source, options)
    else:
        from topd.evaluation.engines import LocalEngine
        from topd.loading.models import loaded_model

        loaded, tokenizer = loaded_model(source, options.dtype)
        engine, config = LocalEngine(loaded, tokenizer, options.batch or 32), loaded.config
    model["fingerprint"] = fingerprint(source) or config._commit_hash
    return engine, model, tokenizer.chat_template is not None


def _vllm(source: str, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from topd.embedded.pair import resolve_model
    from topd.evaluation.engines import VllmEngine
    from topd.loading.adapters import is_adapter
    from topd.loading.models import load_config
    from topd.loading.tokenizers import tokenizer_of

    folder = resolve_model(source)
    if is_adapter(folder):
        raise TOPDError(
            f"{folder} contains an adapter, which --engine vllm does not take: leave --engine out, or merge it first: "
            f"topd merge {folder} --out {folder}-merged."
        )
    tokenizer, config = tokenizer_of(folder), load_config(folder)
    size = options.tensor_parallel
    engine = VllmEngine(folder, tokenizer, config, options.batch or 256, dtype=options.dtype, tensor_parallel_size=size)
    return engine, tokenizer, config
