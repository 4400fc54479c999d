"""`WarmStartConfig`: TRL's SFT options, the teacher, and the weight of its distribution in the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from topd.loading.options import check_kinds, check_objects, rename_dtype


@dataclass
class WarmStartConfig(SFTConfig):
    """Options of `WarmStartTrainer`, on top of TRL's `SFTConfig`. Defaults are the paper's (appendix B.1)."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "chat_template_kwargs"]

    kd_ratio: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the forward KL(teacher || student) in the loss; the rest is cross-entropy on the "
            "teacher's tokens. 0 is plain SFT without a teacher, 1 is KL only. Paper: 0.5."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder, a Hub name, or an embedded model."}
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision of a teacher from the Hub."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of the chat template, such as {enable_thinking: false}; use those that the "
            "solutions were generated with."
        },
    )
    max_length: int | None = field(
        default=16384, metadata={"help": "Maximum tokens per sequence or packed row. Paper: 16384."}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns only the loss, no logits."})

    def __post_init__(self) -> None:
        check_kinds(self)
        super().__post_init__()
        check_objects(self)
        rename_dtype(self)
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"kd_ratio must be in [0, 1]; got {self.kd_ratio}.")
        if self.distils and (self.loss_type != "nll" or self.label_smoothing_factor > 0):
            raise ValueError(
                "loss_type dft and label smoothing are TRL's SFT losses: set kd_ratio=0 for them, or leave them out."
            )

    @property
    def distils(self) -> bool:
        """Whether the teacher is in the loss; otherwise training is TRL's SFT unchanged."""
        return self.kd_ratio > 0
