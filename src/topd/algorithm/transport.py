"""Near-future transport: how far the student's window is from the teacher's, and which token matches which (section 3).

The paper states, for teacher tokens and student tokens of two windows that start at the same prefix::

    D_OT = min over gamma in Pi(a, b) of sum_ij gamma_ij C_ij

Everywhere in this package the student's positions are rows and the teacher's are columns. Marginals are uniform over
the tokens that are there (our choice). Solvers work on a batch of windows whose lengths may differ, and report whether
they converged: a distance that was not reached is NaN, never a number.
"""

from typing import Literal, NamedTuple

import numpy
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GroundCost = Literal["cosine", "sqeuclidean"]
"""cosine: 1 - cosine similarity (our choice; all published distances lie in 0..0.9). sqeuclidean: squared distance."""


class Transport(NamedTuple):
    """Transport between a batch of window pairs.

    Attributes:
        plan: [window, student_position, teacher_position], total mass 1 a window, 0 at padding.
        distance: [window] D_OT, in units of the ground cost. NaN where not converged.
        converged: [window]. False where a window is empty, a cost is not finite, or a solver missed its tolerance.
        marginal_error: [window] L1 distance of the plan's marginals from uniform.
    """

    plan: Float[Tensor, "window student_position teacher_position"]
    distance: Float[Tensor, "window"]
    converged: Bool[Tensor, "window"]
    marginal_error: Float[Tensor, "window"]


def ground_cost(
    student: Float[Tensor, "*window student_position width"],
    teacher: Float[Tensor, "*window teacher_position width"],
    kind: GroundCost = "cosine",
) -> Float[Tensor, "*window student_position teacher_position"]:
    """Cost of moving each student token onto each teacher token, from their embeddings. Never negative.

    An all-zero embedding has cosine 0 with everything.
    """
    if kind == "cosine":
        student = torch.nn.functional.normalize(student, dim=-1)
        teacher = torch.nn.functional.normalize(teacher, dim=-1)
        return (1 - student @ teacher.mT).clamp(min=0)
    squares = student.square().sum(-1)[..., :, None] + teacher.square().sum(-1)[..., None, :]
    return (squares - 2 * student @ teacher.mT).clamp(min=0)


def token_cost(
    student_tokens: Int[Tensor, "window student_position"],
    teacher_tokens: Int[Tensor, "window teacher_position"],
    embeddings: Float[Tensor, "vocabulary width"],
    kind: GroundCost = "cosine",
) -> Float[Tensor, "window student_position teacher_position"]:
    """Ground cost between tokens under static embeddings: one product over the unique tokens, in float32 at least.

    Equal tokens cost exactly 0.
    """
    unique, index = torch.cat([student_tokens.flatten(), teacher_tokens.flatten()]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    table = embeddings[unique].to(torch.promote_types(embeddings.dtype, torch.float32))
    pairs = ground_cost(table, table, kind).fill_diagonal_(0.0)
    rows, columns = index[: student_tokens.numel()], index[student_tokens.numel() :]
    return pairs[rows.view(*student_tokens.shape, 1), columns.view(teacher_tokens.shape[0], 1, teacher_tokens.shape[1])]


def exact_transport(
    cost: Float[Tensor, "window student_position teacher_position"],
    student_mask: Bool[Tensor, "window student_position"],
    teacher_mask: Bool[Tensor, "window teacher_position"],
) -> Transport:
    """The optimal plan. Equal lengths: an assignment (Birkhoff), each pair with mass 1/K. Else: network simplex (POT).

    Masks mark the tokens that are there; they must be a prefix of each row. Solved on the CPU in float64.
    """
    costs = cost.detach().double().cpu().numpy()
    plan = numpy.zeros_like(costs)
    converged = numpy.zeros(len(costs), dtype=bool)
    lengths = zip(student_mask.sum(-1).tolist(), teacher_mask.sum(-1).tolist(), strict=True)
    for window, (rows, columns) in enumerate(lengths):
        block = numpy.s_[window, :rows, :columns]
        if rows == 0 or columns == 0 or not numpy.isfinite(costs[block]).all():
            continue
        plan[block] = _assignment(costs[block]) if rows == columns else _network_simplex(costs[block])
        converged[window] = True
    return _result(cost, torch.from_numpy(plan), torch.from_numpy(converged), student_mask, teacher_mask)


def _assignment(cost: numpy.ndarray) -> numpy.ndarray:
    plan = numpy.zeros_like(cost)
    plan[linear_sum_assignment(cost)] = 1 / len(cost)
    return plan


def _network_simplex(cost: numpy.ndarray) -> numpy.ndarray:
    import ot  # two seconds to import, and needed only where lengths differ

    rows, columns = cost.shape
    a, b = numpy.full(rows, 1 / rows), numpy.full(columns, 1 / columns)
    plan: numpy.ndarray = ot.emd(a, b, cost)  # type: ignore[no-untyped-call]
    return plan


def entropic_transport(
    cost: Float[Tensor, "window student_position teacher_position"],
    student_mask: Bool[Tensor, "window student_position"],
    teacher_mask: Bool[Tensor, "window teacher_position"],
    *,
    epsilon: float = 0.05,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Transport:
    """Log-domain Sinkhorn on the whole batch at once, on the device of the cost.

    The distance is <plan, cost>, without the entropy term; it exceeds the exact one (by some 0.02 at epsilon 0.05), so
    a threshold must be calibrated for each epsilon. Iterates until the L1 error of the marginals is at most
    `tolerance` in every window, or `max_iterations`; a window above `tolerance` is not converged, its distance NaN.
    """
    pair_mask = student_mask[:, :, None] & teacher_mask[:, None, :]
    finite = (cost.isfinite() | ~pair_mask).all(dim=(1, 2))
    scaled = (-cost.detach().double() / epsilon).masked_fill(~finite[:, None, None], 0.0)
    scaled = scaled.masked_fill(~pair_mask, -torch.inf)
    log_a, log_b = _log_uniform(student_mask), _log_uniform(teacher_mask)
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    possible = finite & student_mask.any(-1) & teacher_mask.any(-1)
    plan = torch.zeros_like(scaled)
    for iteration in range(1, max_iterations + 1):
        f = torch.where(student_mask, log_a - (scaled + g[:, None, :]).logsumexp(2), 0.0)
        g = torch.where(teacher_mask, log_b - (scaled + f[:, :, None]).logsumexp(1), 0.0)
        if iteration % 10 == 0 or iteration == max_iterations:
            plan = (scaled + f[:, :, None] + g[:, None, :]).exp()
            if bool((_marginal_error(plan, student_mask, teacher_mask)[possible] <= tolerance).all()):
                break
    plan = torch.where(possible[:, None, None], plan, 0.0)
    error = _marginal_error(plan, student_mask, teacher_mask)
    return _result(cost, plan, possible & (error <= tolerance), student_mask, teacher_mask)


def _result(cost: Tensor, plan: Tensor, converged: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Transport:
    plan = plan.to(cost.device)
    pair_mask = student_mask[:, :, None] & teacher_mask[:, None, :]
    distance = (plan * cost.detach().double().masked_fill(~pair_mask, 0.0)).sum(dim=(1, 2))
    distance = torch.where(converged.to(cost.device), distance, torch.nan)
    error = _marginal_error(plan, student_mask, teacher_mask)
    dtype = cost.dtype
    return Transport(plan.to(dtype), distance.to(dtype), converged.to(cost.device), error.to(dtype))


def _marginal_error(plan: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
    rows = (plan.sum(2) - _log_uniform(student_mask).exp()).abs().sum(-1)
    columns = (plan.sum(1) - _log_uniform(teacher_mask).exp()).abs().sum(-1)
    return torch.maximum(rows, columns)


def _log_uniform(mask: Tensor) -> Tensor:
    length = mask.sum(-1, keepdim=True).clamp(min=1).double()
    return torch.where(mask, -length.log(), -torch.inf)
