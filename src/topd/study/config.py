"""What a study compares: read from YAML and checked before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

from topd.errors import TOPDError
from topd.loading.options import renamed, spelling
from topd.parsing import read_yaml
from topd.teachers.server_address import without_secrets
from topd.visible import slug

REFERENCE = "opd"
"""The arm that every other one is compared with."""
OWN_DATA = ("data", "benchmark", "tune_benchmark", "rule", "sampling")
"""Settings that only a study on your own data has."""
OF_THE_STUDY = {"output_dir", "max_steps", "seed"}
"""Options of `TOPDConfig` that the study sets for each run."""


@dataclass(frozen=True)
class ArmPlan:
    """One arm."""

    name: str
    options: dict[str, Any]  # of `TOPDConfig`; they override the study's
    # option sets that tuning chooses from: the arm's own, equally many in each arm, or the study's grid
    choices: tuple[dict[str, Any], ...] = ()
    time_of: str | None = None  # another arm; this one takes as many steps as fit into its time with the same seed
    tuned_as: str | None = None  # another arm, whose tuned options this one uses where it has none of its own
    steps_factor: float = 1.0  # the number of steps as a multiple of the study's


@dataclass(frozen=True)
class StudyPlan:
    """Arms and seeds that share everything else."""

    student: str  # model names; each run starts from the same student
    teacher: str
    seeds: tuple[int, ...]  # of prompts and sampling; an arm's run and OPD's run with the same seed are a pair
    steps: int  # optimizer steps of a run
    arms: tuple[ArmPlan, ...]
    held_out: int = 1000  # number of problems that each run answers at its end, the same for all
    curve_every: int = 10  # interval of the learning curves, in steps
    curve_problems: int = 200  # 0: no learning curves
    tune_seeds: tuple[int, ...] = (100,)
    tune_problems: int = 500  # neither trained on nor held out
    options: dict[str, Any] = field(default_factory=dict)  # of `TOPDConfig`, common to all arms
    # values of `TOPDConfig` options; arms without `choices`, `time_of` and `tuned_as` choose from all combinations.
    # `guidance_weight` is varied for method topd only.
    grid: dict[str, Any] = field(default_factory=dict)
    level: Literal["short", "long"] = "short"  # of the embedded task's problems
    data: str | None = None  # prompts to train on, as for `topd train`; without it, the embedded task is used
    benchmark: str | None = None  # with `data`: the held-out problems, as for `topd eval`
    tune_benchmark: str | None = None  # with `data`: those for tuning
    rule: Literal["math", "integer", "gsm8k"] = "math"  # how answers to a benchmark of your own are compared
    # with `data`: options of the one sample per problem (`topd.evaluation.engines.Sampling`)
    sampling: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)  # of `peft.LoraConfig`, for adapters instead of all weights

    def settings(self) -> dict[str, Any]:
        """What two records must share to be comparable: everything but the seeds and arms."""
        left_out = {"seeds", "arms"} | (set(OWN_DATA) if self.data is None else set())
        left_out |= set() if self.lora else {"lora"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def read_plan(path: Path, given: Mapping[str, Any] | None = None) -> StudyPlan:
    """Read and check a study's YAML. `given` overrides its entries. Raises `TOPDError` for what does not fit."""
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TOPDError(f"{path} cannot be read: {error}") from error
    try:
        return plan_of({**found, **(given or {})} if isinstance(found, Mapping) else found)
    except (TypeError, ValueError) as error:
        raise TOPDError(f"{path}: {error}") from error


def plan_of(found: Any) -> StudyPlan:
    """The plan in a mapping. Raises `ValueError` for what does not fit."""
    if not isinstance(found, Mapping) or not isinstance(found.get("arms"), Mapping):
        raise ValueError("a study is a mapping with student, teacher, seeds, steps and arms (name: options).")
    known = {each.name for each in fields(StudyPlan)}
    found = renamed(found, lambda name: spelling(name, known))
    found |= {name: _run_options(found[name]) for name in ("options", "grid") if isinstance(found.get(name), Mapping)}
    if unknown := ", ".join(sorted(set(found) - known)):
        raise ValueError(f"unknown: {unknown}. Known: {', '.join(sorted(known))}.")
    if missing := ", ".join(sorted({"student", "teacher", "seeds", "steps"} - set(found))):
        raise ValueError(f"missing: {missing}.")
    grid = found.get("grid", {})
    arms = tuple(_arm(str(name), options or {}, grid) for name, options in found["arms"].items())
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    plan = StudyPlan(**values | {"arms": arms})
    _check(plan)
    return plan


def _arm(name: str, options: Any, grid: Any) -> ArmPlan:
    if not isinstance(options, Mapping):
        raise ValueError(f"arm {name}: its options are not a mapping.")
    own = _run_options(options)
    choices, factor = own.pop("choices", []), own.pop("steps_factor", 1.0)
    time_of, tuned_as = own.pop("time_of", None), own.pop("tuned_as", None)
    if grid and not (choices or time_of or tuned_as):
        if not isinstance(grid, Mapping) or not all(isinstance(values, list) and values for values in grid.values()):
            raise ValueError(
                f"arm {name}: grid must map options to lists of values, such as learning_rate: [1e-4, 2e-4]."
            )
        guided = own.get("method", "topd") == "topd"
        names = [option for option in grid if guided or option != "guidance_weight"]
        choices = [dict(zip(names, values, strict=True)) for values in product(*(grid[option] for option in names))]
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise ValueError(f"arm {name}: choices must be a list of option mappings.")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"arm {name}: steps_factor must be a positive number; got {factor!r}.")
    return ArmPlan(name, own, tuple(map(_run_options, choices)), time_of, tuned_as, float(factor))


def _run_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `TOPDConfig`, or of an arm, in their own spelling."""
    from topd.training import TOPDConfig

    known = {each.name for kind in (TOPDConfig, ArmPlan) for each in fields(kind)}
    return renamed(options, lambda name: spelling(name, known))


def _check(plan: StudyPlan) -> None:
    from topd.training import TOPDConfig

    names = [arm.name for arm in plan.arms]
    if REFERENCE not in names:
        raise ValueError(f"there is no arm {REFERENCE!r}, the reference of all comparisons.")
    folders: dict[str, str] = {}
    for name in names:
        if (other := folders.setdefault(slug(name).casefold(), name)) != name:
            raise ValueError(f"arms {other} and {name} would write to the same folder: rename one of them.")
    for name in ("steps", "held_out", "curve_every", "curve_problems", "tune_problems"):
        least = 0 if name == "curve_problems" else 1
        if not isinstance(getattr(plan, name), int) or getattr(plan, name) < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {getattr(plan, name)!r}.")
    for name, seeds in (("seeds", plan.seeds), ("tune_seeds", plan.tune_seeds)):
        whole = isinstance(seeds, tuple) and all(isinstance(seed, int) for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} must be a list of different whole numbers.")
    if plan.level not in ("short", "long"):
        raise ValueError(f"level must be short or long; got {plan.level!r}.")
    for name in ("options", "sampling", "lora"):
        if not isinstance(getattr(plan, name), dict):
            raise ValueError(f"{name} must be `name: value` lines; got {getattr(plan, name)!r}.")
    known = {each.name for each in fields(TOPDConfig)}
    of_arms = [(f"arm {arm.name}", choice) for arm in plan.arms for choice in (arm.options, *arm.choices)]
    for where, options in [("options", plan.options), *of_arms]:
        if unknown := ", ".join(sorted(set(options) - known)):
            raise ValueError(f"{where}: {unknown} is not an option of TOPDConfig. `topd train --help` lists all.")
        if own := ", ".join(sorted(set(options) & OF_THE_STUDY)):
            raise ValueError(f"{where}: the study itself sets {own}, from its steps, seeds and --out. Leave it out.")
        server = str(options.get("teacher_model_server_url"))
        if without_secrets(server) != server:  # options are written into every record
            raise ValueError(
                f"{where}: leave the password or key out of teacher_model_server_url ({without_secrets(server)}); "
                "teacher_server_key_env names the environment variable that holds a key."
            )
    _check_data(plan)
    tuned = [arm for arm in plan.arms if arm.time_of is None and arm.tuned_as is None]
    if not plan.grid and len({len(arm.choices) for arm in tuned}) > 1:
        raise ValueError("the arms have different numbers of choices: tuning must cost each arm the same.")
    plain = [arm.name for arm in plan.arms if arm.time_of is None]
    if REFERENCE not in plain:
        raise ValueError(f"arm {REFERENCE}: the reference cannot have time_of.")
    for arm in plan.arms:
        if arm.tuned_as is not None and (arm.choices or arm.tuned_as not in [each.name for each in tuned]):
            raise ValueError(f"arm {arm.name}: tuned_as must name an arm that is tuned, in place of choices.")
        if arm.time_of is not None and arm.time_of not in plain:
            raise ValueError(f"arm {arm.name}: time_of {arm.time_of!r} must name another arm without time_of.")
        if arm.time_of is not None and arm.choices:
            raise ValueError(f"arm {arm.name}: with time_of it uses the tuned options of {REFERENCE}: no choices.")


def _check_data(plan: StudyPlan) -> None:
    from topd.evaluation.engines import Sampling

    if plan.data is None:
        for name in ("benchmark", "tune_benchmark", "sampling"):
            if getattr(plan, name):
                raise ValueError(f"{name} needs `data`, the prompts to train on; without it the embedded task is used.")
        return
    if plan.benchmark is None:
        raise ValueError("data needs `benchmark`: the held-out problems, such as math500 or a file with answers.")
    if plan.tune_benchmark is None and any(arm.choices for arm in plan.arms):
        raise ValueError("the arms have choices: `tune_benchmark` must name problems for tuning that are not held out.")
    if plan.rule not in ("math", "integer", "gsm8k"):
        raise ValueError(f"rule must be math, integer or gsm8k; got {plan.rule!r}.")
    known = [each.name for each in fields(Sampling)]
    for name in plan.sampling:
        if name not in known:
            raise ValueError(f"sampling: {name!r} is unknown. Known: {', '.join(known)}.")
