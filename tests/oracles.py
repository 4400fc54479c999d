"""The specification: a naive twin for each fast function of `topd.algorithm`.

Loops, Python floats and targets over the whole vocabulary. Nothing here is fast or stable for large numbers, nothing
imports the package, and each twin is short enough to be checked by eye against its formula.
"""

import itertools
import math
import statistics
from decimal import ROUND_HALF_UP, Decimal

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------------- distributions


def probabilities(logits: list[float]) -> list[float]:
    """exp(z_v) / sum_u exp(z_u); a logit of -inf gives probability 0."""
    top = max(logits)
    unnormalised = [math.exp(logit - top) for logit in logits]
    return [value / sum(unnormalised) for value in unnormalised]


def kl(first: list[float], second: list[float]) -> float:
    """sum_v first(v) (log first(v) - log second(v)) in nats; 0 log 0 = 0; infinite where only `second` is 0."""
    if any(p > 0 and q == 0 for p, q in zip(first, second, strict=True)):
        return math.inf
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(first, second, strict=True) if p > 0)


# ----------------------------------------------------------------------------------------------------------- token loss


def token_kl(student_logits: Tensor, teacher_logits: Tensor, direction: str = "reverse") -> Tensor:
    """reverse: KL(student || teacher); forward: KL(teacher || student); at each position."""
    values = []
    rows = zip(student_logits.flatten(0, -2).tolist(), teacher_logits.flatten(0, -2).tolist(), strict=True)
    for student, teacher in rows:
        p, q = probabilities(student), probabilities(teacher)
        values.append(kl(p, q) if direction == "reverse" else kl(q, p))
    return torch.tensor(values, dtype=torch.float64).reshape(student_logits.shape[:-1])


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p(token) at each position."""
    rows = zip(logits.flatten(0, -2).tolist(), tokens.flatten().tolist(), strict=True)
    values = [-math.log(probabilities(row)[token]) for row, token in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(tokens.shape)


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p(v) log p(v) at each position, in nats; 0 log 0 = 0."""
    values = [-math.fsum(p * math.log(p) for p in probabilities(row) if p > 0) for row in logits.tolist()]
    return torch.tensor(values, dtype=torch.float64)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    terms: tuple[Tensor, Tensor, Tensor] | None = None,
    direction: str = "reverse",
) -> float:
    """sum_i weight_i KL_i over the teacher's rows + sum_k weight_k (-log p_S(token_k | position_k))."""
    kl_of_row = token_kl(student_logits[: len(teacher_logits)], teacher_logits, direction).tolist()
    total = math.fsum(weight * value for weight, value in zip(weights.tolist(), kl_of_row, strict=True))
    for position, token, weight in zip(*(each.tolist() for each in terms or ()), strict=True):
        total -= weight * math.log(probabilities(student_logits[position].tolist())[token])
    return total


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """softcap tanh(scale (h . w_v + b_v) / softcap) / temperature, token by token; [positions, vocabulary]."""
    offsets = [0.0] * len(weight) if bias is None else bias.tolist()
    rows = []
    for state in hidden.tolist():
        row = []
        for column, offset in zip(weight.tolist(), offsets, strict=True):
            logit = scale * (sum(h * w for h, w in zip(state, column, strict=True)) + offset)
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            row.append(logit / temperature)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(hidden), len(weight))


def gathered_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) of each wanted token at each position; [positions, wanted]."""
    rows = zip(logits.tolist(), tokens.tolist(), strict=True)
    values = [[math.log(probabilities(row)[token]) for token in wanted] for row, wanted in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(tokens.shape)


# ----------------------------------------------------------------------------------------------------------- candidates


def highest_loss(
    token_loss: Tensor,
    mask: Tensor,
    share: float | None = None,
    count: int | None = None,
) -> Tensor:
    """Walk down each rollout's positions from the highest loss, leftmost first among equals."""
    chosen = torch.zeros_like(mask)
    for row in range(len(mask)):
        positions = [position for position in range(mask.shape[1]) if mask[row, position]]
        order = sorted(positions, key=lambda position, row=row: (-token_loss[row, position].item(), position))
        if count is not None:
            wanted = count
        else:
            assert share is not None
            wanted = int(Decimal(share * len(positions)).to_integral_value(ROUND_HALF_UP))
        for position in order[: max(wanted, 1)]:
            chosen[row, position] = True
    return chosen


# ------------------------------------------------------------------------------------------------------------ transport


def ground_cost(student: Tensor, teacher: Tensor, kind: str = "cosine") -> Tensor:
    """1 - cosine similarity, or squared Euclidean distance, of each pair of one window's embeddings."""
    values = []
    for s in student.tolist():
        for t in teacher.tolist():
            if kind == "sqeuclidean":
                values.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)))
                continue
            norms = math.hypot(*s) * math.hypot(*t)
            dot = sum(a * b for a, b in zip(s, t, strict=True))
            values.append(1 - (dot / norms if norms > 0 else 0.0))
    return torch.tensor(values, dtype=torch.float64).reshape(len(student), len(teacher))


def transport_distance(cost: Tensor) -> float:
    """Cut both windows into lcm(rows, columns) equal pieces and try every way to pair them (tiny windows only)."""
    rows, columns = cost.shape
    pieces = math.lcm(rows, columns)
    table = cost.tolist()
    totals = []
    for pairing in itertools.permutations(range(pieces)):
        pairs = enumerate(pairing)
        totals.append(sum(table[s * rows // pieces][t * columns // pieces] for s, t in pairs))
    return min(totals) / pieces


def least_moved(cost: Tensor) -> float:
    """The least sum_ij gamma_ij (sqrt(i) - sqrt(j))^2 / K among the cheapest plans, K the longer window (tiny ones)."""
    rows, columns = cost.shape
    pieces = math.lcm(rows, columns)
    table = cost.tolist()
    totals = []
    for pairing in itertools.permutations(range(pieces)):
        pairs = [(s * rows // pieces, t * columns // pieces) for s, t in enumerate(pairing)]
        moved = sum((math.sqrt(i) - math.sqrt(j)) ** 2 for i, j in pairs)
        totals.append((round(sum(table[i][j] for i, j in pairs), 9), moved / max(rows, columns) / pieces))
    return min(totals)[1]


def marginal_error(plan: Tensor, rows: int, columns: int) -> float:
    """The larger L1 distance of one window's two marginals from uniform."""
    row_error = sum(abs(sum(plan[i].tolist()) - 1 / rows) for i in range(rows))
    column_error = sum(abs(sum(plan[:, j].tolist()) - 1 / columns) for j in range(columns))
    return max(row_error, column_error)


def entropic_plan(cost: Tensor, epsilon: float, iterations: int = 5000) -> Tensor:
    """Sinkhorn as first written down: scale the rows of exp(-C / epsilon), then its columns, until nothing changes."""
    rows, columns = cost.shape
    plan = (-cost.double() / epsilon).exp()
    for _ in range(iterations):
        before = plan
        plan = plan / plan.sum(1, keepdim=True) / rows
        plan = plan / plan.sum(0, keepdim=True) / columns
        if (plan - before).abs().max() < 1e-15:
            break
    return plan


# --------------------------------------------------------------------------------------------- forks and down-weighting


def is_fork(distance: Tensor, share: float) -> list[bool]:
    """The lowest `share` of the known distances, whatever equals them, and 0, are no forks."""
    known = sorted(value for value in distance.tolist() if math.isfinite(value))
    low = known[: int(Decimal(share * len(known)).to_integral_value(ROUND_HALF_UP))]
    return [not math.isnan(value) and value > 0 and all(value > other for other in low) for value in distance.tolist()]


def cap_weights(token_loss: Tensor, mask: Tensor, capped: Tensor) -> Tensor:
    """min(loss, median of the rollout's losses) / loss at capped positions, 1 elsewhere."""
    weights = torch.ones(token_loss.shape, dtype=torch.float64)
    for row, losses in enumerate(token_loss.tolist()):
        inside = [loss for loss, counts in zip(losses, mask[row].tolist(), strict=True) if counts]
        for position, loss in enumerate(losses):
            if mask[row, position] and capped[row, position] and loss > statistics.median(inside):
                weights[row, position] = statistics.median(inside) / loss
    return weights


# ------------------------------------------------------------------------------------------------------------- guidance


def vocabulary_targets(weight: Tensor, tokens: Tensor, vocabulary: int) -> list[list[float]]:
    """One fork's y_i = sum_j gamma_ij onehot(token j), scaled to sum to 1; all zeros where a row has no mass."""
    targets = []
    for masses in weight.tolist():
        target = [0.0] * vocabulary
        for mass, token in zip(masses, tokens.tolist(), strict=True):
            target[token] += mass / sum(masses) if sum(masses) > 0 else 0.0
        targets.append(target)
    return targets


def trajectory_loss(weight: Tensor, tokens: Tensor, student_logits: Tensor) -> list[float]:
    """One fork's KL(y_i || p_S(. | c_{t+i})) over the whole vocabulary, at each student window position."""
    targets = vocabulary_targets(weight, tokens, student_logits.shape[-1])
    rows = zip(targets, student_logits.tolist(), strict=True)
    return [kl(target, probabilities(logits)) for target, logits in rows]


def own_token_share(weight: Tensor, tokens: Tensor, student_tokens: Tensor) -> list[float]:
    """One fork's y_i(the student's own token at i)."""
    vocabulary = int(max(tokens.max(), student_tokens.max())) + 1
    targets = vocabulary_targets(weight, tokens, vocabulary)
    return [target[own] for target, own in zip(targets, student_tokens.tolist(), strict=True)]


def prefix_weights(now: Tensor, then: Tensor, mask: Tensor, most: float) -> list[list[float]]:
    """min(exp(mean drift of the tokens before), most), token by token; 1 at the first."""
    rows = []
    for row in range(len(now)):
        drifts, weights = [], []
        for position in range(now.shape[1]):
            mean = sum(drifts) / len(drifts) if drifts else 0.0
            weights.append(min(math.exp(mean), most))
            if mask[row, position]:
                drifts.append(float(now[row, position]) - float(then[row, position]))
        rows.append(weights)
    return rows


def top_k_overlap(student_logits: Tensor, teacher_logits: Tensor, k: int) -> list[float]:
    """Share of the k most likely tokens that both have, position by position."""
    overlaps = []
    for ours, theirs in zip(student_logits.tolist(), teacher_logits.tolist(), strict=True):
        best = [set(sorted(range(len(row)), key=lambda token: -row[token])[:k]) for row in (ours, theirs)]
        overlaps.append(len(best[0] & best[1]) / k)
    return overlaps
