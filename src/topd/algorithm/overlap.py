"""How many of the most likely tokens student and teacher have in common at a position."""

import torch
from jaxtyping import Float
from torch import Tensor

from topd.algorithm.head import Head
from topd.algorithm.tiles import Tiles, check_vocabularies


@torch.no_grad()
def top_k_overlap(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    k: int,
    tile_elements: int | None = None,
) -> Float[Tensor, "positions"]:
    """Share (0..1) of the student's `k` most likely tokens that are among the teacher's `k`, tile by tile.

    The states stand in the same contexts, the heads over the same vocabulary. `tile_elements`: as in `score_tokens`.

    Raises:
        RuntimeError: the heads' vocabularies differ in size.
    """
    check_vocabularies(student_head, teacher_head)
    tiles = Tiles(student_hidden, student_head, tile_elements)
    overlap = tiles.student.new_empty(len(student_hidden))
    k = min(k, student_head.weight.shape[0])
    for rows in tiles.split(len(student_hidden)):
        ours = student_head.write_logits(student_hidden[rows], tiles.student[: len(rows)]).topk(k).indices
        theirs = teacher_head.write_logits(teacher_hidden[rows], tiles.other[: len(rows)]).topk(k).indices
        overlap[rows] = (ours[:, :, None] == theirs[:, None, :]).any(-1).to(overlap.dtype).mean(-1)
    return overlap
