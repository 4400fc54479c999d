"""The teacher's server, as the options describe it; and what needs the teacher's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.teachers.openai_server import Limits, OpenAIServer
from topd.teachers.server_windows import ServerWindows, connect, served_as

REMEDY = (
    "Fix or restart it; a run that had started continues from its last checkpoint (--resume_from_checkpoint true). "
    "teacher_server_patience and teacher_server_timeout say how long it is waited for."
)

if TYPE_CHECKING:
    from topd.training.config import TOPDConfig


def teacher_server(options: TOPDConfig, has_weights: bool, patience: float | None = None) -> OpenAIServer | None:
    """The server, reached and with the teacher on it, or None where none is named or needed. Needs no models.

    Args:
        patience: seconds, instead of the option.

    Raises:
        ServerError: there is no such server, or it does not serve the teacher.
    """
    if options.teacher_window_server is None or (has_weights and not options.looks_ahead):
        return None
    patience = options.teacher_server_patience if patience is None else patience
    limits = Limits(options.teacher_server_timeout, patience, options.teacher_server_concurrency)
    server = OpenAIServer(
        options.teacher_window_server, limits, "The teacher's server", REMEDY, options.teacher_server_key_env
    )
    served_as(server, options.teacher_server_model)
    return server


def teacher_windows(
    server: OpenAIServer,
    options: TOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    vocabulary: int | None = None,
) -> ServerWindows:
    """Windows as the options describe them. Raises `TOPDError`: see `connect`."""
    return connect(server, tokenizer, eos_token_ids, options.teacher_server_model, vocabulary=vocabulary)


def contexts(student: Any, teacher: Any, server: ServerWindows | None) -> dict[str, PreTrainedConfig]:
    """Configs that say how many tokens each of them takes."""
    configs: dict[str, Any] = {"student": student.config}
    if teacher is not None:
        configs["teacher"] = teacher.config
    if server is not None:
        limit: dict[str, Any] = {"max_position_embeddings": server.context}
        configs["teacher's server"] = PreTrainedConfig(**limit)
    return configs


def check_without_weights(options: TOPDConfig) -> None:
    """Raise `TOPDError` for what a teacher behind a server cannot do."""
    if options.teacher_window_server is None:
        raise TOPDError(
            "TOPDTrainer needs a teacher: a teacher_model (a name, a folder, or a loaded model), or the "
            "teacher_window_server that it is on."
        )
    kl_in_its_contexts = options.guidance_context == "teacher" and options.teacher_context_loss != "cross_entropy"
    wrong = {
        f"embedding={options.embedding} (use student)": options.embedding.startswith("teacher"),
        f"teacher_context_loss={options.teacher_context_loss} (use cross_entropy)": kl_in_its_contexts,
        f"temperature={options.temperature:g} (use 1: servers give probabilities at 1)": options.temperature != 1,
        f"beta={options.beta:g} (use 1 or 0)": options.beta not in (0.0, 1.0),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise TOPDError(f"A teacher behind a server, without a teacher_model, cannot have {', nor '.join(found)}.")
