"""Settings of the whole suite: offline, one thread, the same random numbers every time."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

gc.disable()  # until all tests are collected: what is imported stays
torch.set_num_threads(1)

settings.register_profile(
    "proof",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is not an error
)
settings.load_profile("proof")


def pytest_collection_finish() -> None:
    """accelerate collects garbage in every training, and need not look at what is imported by now."""
    gc.freeze()
    gc.enable()


@cache
def once(tried: Callable[..., Any]) -> Callable[..., Any]:
    """Try a way on the first Qwen3 model of each configuration only: what is exact does not depend on the weights."""
    known: dict[Any, Any] = {}

    def found(model: Any, *given: Any) -> Any:
        if type(model).__name__ != "Qwen3ForCausalLM":
            return tried(model, *given)
        config, trains = model.config, any(parameter.requires_grad for parameter in model.parameters())
        kind = config.to_json_string(), config._attn_implementation, str(model.dtype), model.device.type, trains, *given
        if kind not in known:
            known[kind] = tried(model, *given)
        return known[kind]

    return found


@pytest.fixture(autouse=True, scope="module")
def quick_commands(request: pytest.FixtureRequest) -> Iterator[None]:
    """What commands would do again in each test: try the embedded models (1.2 s), write 4,096 problems (0.4 s), and
    draw 1,000 bootstrap samples of a probe (2.5 s).

    The tests of the trials themselves, test_ways.py, are left alone.
    """
    trials = {"topd.near_future.self_check": "check_model", "topd.evaluation.engines": "batching_of"}
    with pytest.MonkeyPatch.context() as patch:
        if "transformers" in sys.modules and request.path.name != "test_ways.py":
            for module, name in trials.items():
                patch.setattr(found := import_module(module), name, once(getattr(found, name)))
        if "topd.cli.options" in sys.modules:
            patch.setattr("topd.cli.options.EMBEDDED_PROMPTS", 256)
        if "topd.analysis.probe_summary" in sys.modules:
            patch.setattr("topd.analysis.probe_summary.summary.__defaults__", (100, 0))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (what libraries draw from)
    torch.manual_seed(0)
