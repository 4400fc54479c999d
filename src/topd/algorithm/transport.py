"""Near-future transport: the distance between the student's and the teacher's window, and their matching (section 3).

The paper defines, for the tokens of two windows that start at the same prefix::

    D_OT = min over gamma in Pi(a, b) of sum_ij gamma_ij C_ij

In this package rows are always student positions and columns teacher positions. Marginals are uniform over the real
tokens (our choice). Solvers take a batch of windows of different lengths and report convergence; the distance of a
window that did not converge is NaN.

If a window repeats a token, several plans have the same cost. The exact solver then returns the plan that moves tokens
the shortest way along the window (our choice, see `_tie_broken`).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import lap
import numpy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import embedding  # it gathers several times faster than an index

from topd.algorithm.vocabulary import check_choice

GroundCost = Literal["cosine", "sqeuclidean"]
"""cosine: 1 - cosine similarity (our choice; all published distances lie in 0..0.9). sqeuclidean: squared distance."""

TIE_BREAK = 1e-8
"""Weight of the distance along the window, relative to the range of a window's costs. It raises a plan's cost by
at most 2e-9 of that range, which is less than the rounding of float32 costs."""

EXACT_TOLERANCE = 1e-9
"""Maximum L1 distance of an exact plan's marginals from uniform. It is larger if a mask is not a prefix."""


class Transport(NamedTuple):
    """Transport between a batch of window pairs.

    Attributes:
        plan: [window, student_position, teacher_position], total mass 1 per window, 0 at padding.
        distance: [window] D_OT, in units of the ground cost; NaN if not converged.
        converged: [window] False if a window is empty, a cost is not finite, or the solver missed its tolerance.
        marginal_error: [window] L1 distance of the plan's marginals from uniform.
    """

    plan: Float[Tensor, "window student_position teacher_position"]
    distance: Float[Tensor, "window"]
    converged: Bool[Tensor, "window"]
    marginal_error: Float[Tensor, "window"]


# ---------------------------------------------------------------------------------------------------------------- costs


def ground_cost(
    student: Float[Tensor, "*window student_position width"],
    teacher: Float[Tensor, "*window teacher_position width"],
    kind: GroundCost = "cosine",
) -> Float[Tensor, "*window student_position teacher_position"]:
    """Cost of moving each student token onto each teacher token, from their embeddings. Never negative.

    cosine: 1 - cosine, from 0 to 2; the cosine of an all-zero embedding is 0. sqeuclidean: |s - t|^2. The paper says
    "embedding space" and gives no cost: our choice.
    """
    check_choice("kind", kind, GroundCost)
    if kind == "cosine":
        norms: Tensor = vector_norm(student, dim=-1)[..., :, None] * vector_norm(teacher, dim=-1)[..., None, :]
        return (1 - student @ teacher.mT / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    squares = student.square().sum(-1)[..., :, None] + teacher.square().sum(-1)[..., None, :]
    return (squares - 2 * student @ teacher.mT).clamp(min=0)


def token_cost(
    student_tokens: Int[Tensor, "window student_position"],
    teacher_tokens: Int[Tensor, "window teacher_position"],
    embeddings: Float[Tensor, "vocabulary width"],
    kind: GroundCost = "cosine",
) -> Float[Tensor, "window student_position teacher_position"]:
    """Ground cost between tokens under static embeddings, at least float32, on the device of the embeddings.

    Equal tokens cost exactly 0. Within a window equal pairs of tokens have exactly equal costs: a matrix product may
    round them differently, so each pair takes the value of its first occurrence.
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    costs = torch.empty(*student_tokens.shape, teacher_tokens.shape[1], dtype=dtype, device=embeddings.device)
    gathered = 2**18 if embeddings.device.type == "cpu" else 2**26  # elements at once: fits a CPU cache; 1/4 GiB
    windows = max(1, gathered // max(1, student_tokens.shape[1] * embeddings.shape[1]))
    for start in range(0, len(costs), windows):
        ours, theirs = student_tokens[start : start + windows], teacher_tokens[start : start + windows]
        cost = ground_cost(embedding(ours, embeddings).to(dtype), embedding(theirs, embeddings).to(dtype), kind)
        cost.masked_fill_(ours[:, :, None] == theirs[:, None, :], 0.0)
        pair = _first_occurrence(ours)[:, :, None] * theirs.shape[1] + _first_occurrence(theirs)[:, None, :]
        costs[start : start + windows] = cost.flatten(1).gather(1, pair.flatten(1)).view_as(cost)
    return costs


def _first_occurrence(tokens: Tensor) -> Tensor:
    """[window, position] the first position in the window with the same token."""
    if tokens.numel() == 0:
        return tokens
    return (tokens[:, :, None] == tokens[:, None, :]).byte().argmax(-1)


# ---------------------------------------------------------------------------------------------------------------- exact


def exact_transport(
    cost: Float[Tensor, "window student_position teacher_position"],
    student_mask: Bool[Tensor, "window student_position"],
    teacher_mask: Bool[Tensor, "window teacher_position"],
) -> Transport:
    """D_OT, the minimum of <plan, cost> over plans with uniform marginals (section 3), and the plan.

    Equal lengths: an assignment (Birkhoff), each pair with mass 1/K. Otherwise: network simplex (POT). Uniform
    marginals, the exact solver, and which of several equally cheap plans is taken, are our choice
    (docs/paper_to_code.md). Runs on the CPU in float64, on windows of the same lengths together, with as many threads
    as torch has.

    Args:
        cost: of moving each student token onto each teacher token; padding is ignored.
        student_mask: the real tokens, which must be a prefix of each row.
        teacher_mask: the same.

    Returns:
        The transport, on the device of the cost, without gradient. A window that cannot be solved does not raise: see
            `Transport.converged`.

    Raises:
        ValueError: the cost is not that of a batch of windows, or the shape of a mask does not match it.
    """
    cost, student_mask, teacher_mask = _checked(cost, student_mask, teacher_mask)
    costs = cost.detach().to("cpu", torch.promote_types(cost.dtype, torch.float32))
    entries = [_Entries.none()]
    for windows, rows, columns in _same_lengths(student_mask, teacher_mask):
        scaled, finite = _tie_broken(costs.index_select(0, windows)[:, :rows, :columns].double())
        solve = _assignments if rows == columns else _network_simplexes
        found = solve(scaled.index_select(0, finite).numpy())
        entries.append(found._replace(window=windows[finite].numpy()[found.window]))
    window, row, column, mass = (torch.from_numpy(numpy.concatenate(each)) for each in zip(*entries, strict=True))
    plan = torch.zeros_like(cost)
    plan[tuple(each.to(cost.device) for each in (window, row, column))] = mass.to(cost)
    distance, converged = torch.zeros(len(cost)).double(), torch.zeros(len(cost), dtype=torch.bool)
    distance.index_add_(0, window, mass * costs[window, row, column].double())
    converged[window] = True  # every plan has an entry
    a, b = (torch.zeros(mask.shape).double() for mask in (student_mask, teacher_mask))
    error = _marginal_error(
        a.index_put_((window, row), mass, accumulate=True),
        b.index_put_((window, column), mass, accumulate=True),
        student_mask.cpu(),
        teacher_mask.cpu(),
    )
    return _transport(plan, distance, converged & (error <= EXACT_TOLERANCE), error)


class _Entries(NamedTuple):
    """The nonzero entries of the plans of several windows."""

    window: numpy.ndarray
    row: numpy.ndarray
    column: numpy.ndarray
    mass: numpy.ndarray

    @classmethod
    def none(cls) -> "_Entries":
        nothing = numpy.zeros(0, dtype=numpy.int64)
        return cls(nothing, nothing, nothing, numpy.zeros(0))


def _same_lengths(student_mask: Tensor, teacher_mask: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """(windows, rows, columns) of windows with the same lengths, as many as fit a CPU cache. Skips empty windows."""
    lengths = torch.stack([student_mask.sum(-1), teacher_mask.sum(-1)], -1).cpu()
    pairs, group = lengths.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    for index, (rows, columns) in enumerate(pairs.tolist()):
        if rows and columns:
            for windows in (group == index).nonzero()[:, 0].split(max(1, 2**18 // (rows * columns))):
                yield windows, rows, columns


def _tie_broken(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Costs scaled to 0..1 plus a term that breaks ties; and the windows with finite costs.

    C_ij + TIE_BREAK (sqrt(i) - sqrt(j))^2 / K, with K the longer length, selects, among equally cheap plans, the one
    that moves tokens the shortest way along the window, above all early tokens (our choice). With (i - j)^2, or any
    integers, several plans can have the same sum, and solvers would still differ. With square roots this hardly ever
    happens.
    """
    low, high = cost.amin((1, 2), keepdim=True), cost.amax((1, 2), keepdim=True)
    span = high - low
    i, j = (torch.arange(length, dtype=cost.dtype).sqrt() for length in cost.shape[1:])
    moved = (i[:, None] - j).square() / max(cost.shape[1:])
    scaled = (cost - low).div_(torch.where(span > 0, span, 1.0)).add_(TIE_BREAK * moved)
    return scaled, span.flatten().isfinite().nonzero()[:, 0]


def _assignments(costs: numpy.ndarray) -> _Entries:
    """The best permutation of each window [window, K, K] (Jonker-Volgenant)."""
    windows, length, _ = costs.shape
    _, columns = lap.lapjvr_batch(costs, return_cost=False, n_threads=torch.get_num_threads())
    window, row = numpy.divmod(numpy.arange(windows * length), length)
    column = numpy.concatenate(columns) if columns else row
    return _Entries(window, row, column, numpy.full(windows * length, 1 / length))


def _network_simplexes(costs: numpy.ndarray) -> _Entries:
    """Plans of windows [window, n, m]. The solver gets integer masses, m per row and n per column: no rounding."""
    import ot  # takes two seconds to import; needed only if lengths differ

    _, rows, columns = costs.shape
    entries, options = [_Entries.none()], {"numItermax": 10**6, "center_dual": False, "check_marginals": False}
    for window, cost in enumerate(costs):
        a, b = numpy.full(rows, float(columns)), numpy.full(columns, float(rows))
        flow, log = ot.emd(a, b, cost, log=True, **options)  # type: ignore[no-untyped-call]
        if log["warning"] is None:  # otherwise not optimal
            row, column = flow.nonzero()
            entries.append(_Entries(numpy.full(len(row), window), row, column, flow[row, column] / (rows * columns)))
    return _Entries(*map(numpy.concatenate, zip(*entries, strict=True)))


# ------------------------------------------------------------------------------------------------------------- entropic


def entropic_transport(
    cost: Float[Tensor, "window student_position teacher_position"],
    student_mask: Bool[Tensor, "window student_position"],
    teacher_mask: Bool[Tensor, "window teacher_position"],
    *,
    epsilon: float = 0.05,
    max_iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Transport:
    """Sinkhorn in float64 on the whole batch, on the device of the cost. Our choice; the paper names no solver.

    The plan is soft: it may match a student position to several teacher tokens, while the exact plan of two windows of
    equal length is a permutation. The paper's "soft target" and "soft matching" fit this solver better.

    The distance is <plan, cost> without the entropy term. It is larger than the exact one, so a threshold must be
    calibrated for each epsilon. Stops when the L1 error of the marginals is at most `tolerance` in every window, or
    after `max_iterations`. A window above `tolerance` has not converged; its distance is NaN.

    The first of every ten iterations runs in the log domain, so that nothing underflows. The other nine scale the rows
    and columns of the plan, by moderate factors (for rows between 1/n and m).

    Args:
        cost: as in `exact_transport`.
        student_mask: the real tokens.
        teacher_mask: the same.
        epsilon: strength of the entropy term, in units of each window's mean cost, so that it means the same for every
            embedding and ground cost.
        max_iterations: maximum number of iterations.
        tolerance: maximum L1 distance of the marginals from uniform.

    Raises:
        ValueError: the cost is not that of a batch of windows, or the shape of a mask does not match it.
    """
    cost, student_mask, teacher_mask = _checked(cost, student_mask, teacher_mask)
    pair_mask = student_mask[:, :, None] & teacher_mask[:, None, :]
    finite = (cost.isfinite() | ~pair_mask).all(dim=(1, 2))
    costs = cost.detach().double().masked_fill(~(pair_mask & finite[:, None, None]), 0.0)
    mean = costs.sum((1, 2), keepdim=True) / pair_mask.sum((1, 2)).clamp(min=1)[:, None, None]
    scaled = -costs / (epsilon * mean).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = scaled.masked_fill(~pair_mask, -torch.inf)
    log_a, log_b = _log_uniform(student_mask), _log_uniform(teacher_mask)
    g, plan = torch.zeros_like(log_b), torch.zeros_like(scaled)
    possible = finite & student_mask.any(-1) & teacher_mask.any(-1)
    error = torch.full(finite.shape, torch.inf, dtype=torch.float64, device=cost.device)
    for done in range(0, max_iterations, 10):
        f = torch.where(student_mask, log_a - (scaled + g[:, None, :]).logsumexp(2), 0.0)
        g = torch.where(teacher_mask, log_b - (scaled + f[:, :, None]).logsumexp(1), 0.0)
        plan = (scaled + f[:, :, None] + g[:, None, :]).exp()
        u, v = torch.ones_like(f), torch.ones_like(g)
        for _ in range(min(10, max_iterations - done) - 1):
            u = torch.where(student_mask, log_a.exp() / (plan @ v[:, :, None])[:, :, 0], 1.0)
            v = torch.where(teacher_mask, log_b.exp() / (u[:, None, :] @ plan)[:, 0, :], 1.0)
        plan, g = u[:, :, None] * plan * v[:, None, :], g + v.log()
        error = _marginal_error(plan.sum(2), plan.sum(1), student_mask, teacher_mask)
        if bool((error[possible] <= tolerance).all()):
            break
    plan = torch.where(possible[:, None, None], plan, 0.0)
    error = _marginal_error(plan.sum(2), plan.sum(1), student_mask, teacher_mask)
    distance = (plan * cost.detach().double().masked_fill(~pair_mask, 0.0)).sum(dim=(1, 2))
    return _transport(plan.to(cost.dtype), distance, possible & (error <= tolerance), error)


def _checked(cost: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with costs that are not integers, and masks of True and False."""
    if cost.dim() != 3:
        raise ValueError(f"The cost must be [window, student, teacher], not {[*cost.shape]}. For one: cost[None].")
    windows, rows, columns = cost.shape
    if student_mask.shape != (windows, rows) or teacher_mask.shape != (windows, columns):
        raise ValueError(
            f"The cost has {windows} windows, {rows} student and {columns} teacher tokens; the masks must have shapes "
            f"{[windows, rows]} and {[windows, columns]}, not {[*student_mask.shape]} and {[*teacher_mask.shape]}."
        )
    return cost if cost.is_floating_point() else cost.float(), student_mask.bool(), teacher_mask.bool()


def _transport(plan: Tensor, distance: Tensor, converged: Tensor, error: Tensor) -> Transport:
    """A `Transport` on the device and in the dtype of the plan."""
    distance = torch.where(converged, distance, torch.nan)
    return Transport(plan, distance.to(plan), converged.to(plan.device), error.to(plan))


def _marginal_error(rows: Tensor, columns: Tensor, student_mask: Tensor, teacher_mask: Tensor) -> Tensor:
    """[window] from the row and column sums of the plans."""
    rows, columns = rows - _log_uniform(student_mask).exp(), columns - _log_uniform(teacher_mask).exp()
    return torch.maximum(rows.abs().sum(-1), columns.abs().sum(-1))


def _log_uniform(mask: Tensor) -> Tensor:
    length = mask.sum(-1, keepdim=True).clamp(min=1).double()
    return torch.where(mask, -length.log(), -torch.inf)
