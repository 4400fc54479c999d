"""The teacher's server, as the options describe it; and what needs the teacher's weights."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from topd.errors import TOPDError
from topd.teachers.openai_server import Limits, OpenAIServer
from topd.teachers.server_windows import ServerWindows, served_as

REMEDY = (
    "Fix or restart it; a run that had started continues from its last checkpoint (--resume_from_checkpoint true). "
    "teacher_server_kwargs sets its timeout and patience."
)

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig


def teacher_server(options: TOPDConfig, has_weights: bool, patience: float | None = None) -> OpenAIServer | None:
    """The server, reached and with the teacher on it, or None where none is named or needed. Needs no models.

    `patience`: seconds, instead of the option. Raises `ServerError` if there is no such server, or it does not serve
    the teacher; `TOPDError` for unknown or not positive values of `teacher_server_kwargs`.
    """
    if options.teacher_model_server_url is None or (has_weights and not options.looks_ahead):
        return None
    given: Any = options.teacher_server_kwargs or {}
    known = [field.name for field in fields(Limits)]
    wrong = [f"{name}: {value}" for name, value in given.items() if name not in known or not 0 < value < float("inf")]
    if wrong:
        raise TOPDError(f"teacher_server_kwargs takes positive values of {', '.join(known)}; got {', '.join(wrong)}.")
    limits = Limits(**given | ({} if patience is None else {"patience": patience}))
    server = OpenAIServer(
        options.teacher_model_server_url, limits, "The teacher's server", REMEDY, options.teacher_server_key_env
    )
    served_as(server, options.teacher_server_model)
    return server


def contexts(student: Any, teacher: Any, server: ServerWindows | None) -> dict[str, PreTrainedConfig]:
    """Configs that say how many tokens each of them takes; of None, none."""
    models = {"student": student, "teacher": teacher}
    configs: dict[str, Any] = {role: model.config for role, model in models.items() if model is not None}
    if server is not None:
        limit: dict[str, Any] = {"max_position_embeddings": server.context}
        configs["teacher's server"] = PreTrainedConfig(**limit)
    return configs


def check_without_weights(options: TOPDConfig) -> None:
    """Raise `TOPDError` for what a teacher behind a server cannot do."""
    if options.teacher_model_server_url is None:
        raise TOPDError(
            "TOPDTrainer needs a teacher: a teacher_model (a name, a folder, or a loaded model), or the "
            "teacher_model_server_url that it is on."
        )
    wrong = {
        f"embedding={options.embedding} (use student)": options.embedding.startswith("teacher"),
        "guidance_context=teacher (use student)": options.guidance_context == "teacher",
        f"temperature={options.temperature:g} (use 1: servers give probabilities at 1)": options.temperature != 1,
        f"beta={options.beta:g} (use 1 or 0)": options.beta not in (0.0, 1.0),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise TOPDError(f"A teacher on a server, without a teacher_model, cannot have {', nor '.join(found)}.")
