"""What `self_check` compares with: random rollouts and windows, and their true states, every sequence alone, without
padding or cache. And what must hold of a model run that way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from topd.near_future.model_parts import last_states, left_padded, output_head
from topd.near_future.sampling import SamplingStates
from topd.near_future.ways import ArchitectureError
from topd.near_future.windows import Branches, Rollouts

PROMPTS, RESPONSE, WINDOW = (4, 7), 10, 4
STARTS = ((5, 8), (2, 5))
"""Response positions of the windows: behind prefixes of the same lengths in both rollouts."""
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference from the truth, as a share of how far states lie apart."""
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sample:
    """Random rollouts and windows, and the true states."""

    rollouts: Rollouts
    branches: Branches
    row_states: list[Tensor]  # of each rollout alone [token, width], prompt included
    window_states: Tensor  # [rollout, branch, window_position, width], that predict the windows' tokens
    noise: float = 0.0  # how far the truth is from itself where another number of rows shares the batch

    @property
    def response_states(self) -> Tensor:
        """[rollout, position, width] the true states that predict the responses."""
        return torch.stack([states[p - 1 : -1] for states, p in zip(self.row_states, PROMPTS, strict=True)])

    def error(self, found: Tensor, truth: Tensor) -> str | None:
        """How far states are from the truth, in words; None if that is rounding."""
        difference = difference_of(found, truth)
        if difference <= self._tolerance(truth.dtype):
            return None
        return f"states differ by {difference:.2g} of their spread"

    def below_best(self, model: Any, prompt: Tensor, response: Tensor, share: float = 1.0) -> str | None:
        """How far tokens of a response are below the best ones of the plain way, in words; None if by rounding.

        `share`: of the tokens that must be near the best.
        """
        row = torch.cat([prompt, response])[None]
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        chosen = logits.gather(-1, response[:, None])[:, 0]
        furthest = float(((logits.amax(-1) - chosen) / logits.std(-1)).quantile(share))
        if furthest <= self._tolerance(self.window_states.dtype):
            return None
        return f"whose logits are up to {furthest:.2g} standard deviations below the highest"

    def _tolerance(self, dtype: torch.dtype) -> float:
        return max(TOLERANCE.get(dtype, FLOAT32_TOLERANCE), 10 * self.noise)


def difference_of(found: Tensor, truth: Tensor) -> float:
    """Distance as a share of how far states lie apart: the largest.

    In 16 bits, where rounding sends some tokens to other experts, it is the 80th percentile.
    """
    if found.shape != truth.shape:
        return math.inf
    low = truth.dtype in TOLERANCE
    found, truth = found.double().flatten(0, -2), truth.double().flatten(0, -2)
    spread = (truth - truth.mean(0)).norm(dim=-1).mean()
    distances = (found - truth).norm(dim=-1) / spread
    if not bool(distances.isfinite().all()):
        return math.inf
    return float(distances.quantile(0.8) if low else distances.max())


def sample_of(model: Any, backbone: nn.Module) -> Sample:
    """Random tokens, and every sequence alone."""
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    ordinary = ordinary_tokens(model)

    def tokens(*shape: int) -> Tensor:
        return ordinary[torch.randint(len(ordinary), shape, generator=generator)].to(device)

    ids, mask = left_padded([tokens(length) for length in PROMPTS], padding_of(model))
    response, window = tokens(2, RESPONSE), tokens(2, 2, WINDOW)
    ones = torch.ones_like(response)
    rollouts = Rollouts(ids, mask, response, ones, ones)
    branches = Branches(torch.tensor(STARTS, device=device), window, torch.ones_like(window).bool())
    rows = [alone(backbone, rollouts.prefix(row, RESPONSE)) for row in range(2)]
    ends = [
        [torch.cat([rollouts.prefix(row, STARTS[row][slot]), window[row, slot, :-1]]) for row in range(2)]
        for slot in range(2)
    ]  # of the same length for each slot
    states = [last_states(backbone, torch.stack(pair), None)[:, -WINDOW:] for pair in ends]
    windows = torch.stack(states, dim=1)
    noise = difference_of(windows[:1, 0], alone(backbone, ends[0][0])[None, -WINDOW:])
    return Sample(rollouts, branches, rows, windows, noise)


def alone(backbone: nn.Module, ids: Tensor) -> Tensor:
    """[token, width] last hidden states of one sequence."""
    return last_states(backbone, ids[None], None)[0]


def ordinary_tokens(model: Any) -> Tensor:
    """Ids that have no special meaning to the model."""
    config = model.config.get_text_config()
    special: set[int | None] = {padding_of(model)}
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    return torch.tensor([token for token in range(min(config.vocab_size, 2**16)) if token not in special])


def padding_of(model: Any) -> int:
    value = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if value is None or value < 0 else int(value)


def small_parameters(model: nn.Module, backbone: nn.Module) -> list[nn.Parameter]:
    """Those of the backbone whose gradients cost little.

    None of a model in parts, whose backward pass all processes must join.
    """
    if any(isinstance(module, FSDPModule) or hasattr(module, "ds_id") for module in model.modules()):
        return []
    return [p for p in backbone.parameters() if p.dim() <= 1 and p.is_floating_point()]


def gradients_of(states: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a fixed random sum of states; zeros where a parameter has no part in them."""
    usual = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = states().float()
            weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.device)
            gradients = torch.autograd.grad((found * weight).sum(), parameters, allow_unused=True)
    finally:
        for parameter, requires in zip(parameters, usual, strict=True):
            parameter.requires_grad_(requires)
    return [
        torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, gradients, strict=True)
    ]


def stop_unless_causal(model: Any, sample: Sample) -> None:
    """The state before a window must not depend on what follows in the rollout."""
    ends = [
        states[[p + start - 1 for start in starts]]
        for states, p, starts in zip(sample.row_states, PROMPTS, STARTS, strict=True)
    ]
    error = sample.error(torch.stack(ends), sample.window_states[:, :, 0])
    if error is not None:
        raise ArchitectureError(
            f"{type(model).__name__} is not causal: its states change with the tokens that follow ({error}). "
            "If the architecture can decode, say so in its config (is_decoder=True)."
        )


def stop_unless_head(model: Any, sample: Sample) -> None:
    """The output head on the true states must give the model's logits."""
    row = sample.rollouts.input_ids[1:]
    try:
        logits = model(input_ids=row, use_cache=False).logits[0]
        found = output_head(model).logits(sample.row_states[1])
        error = sample.error(found, logits)
    except Exception as failure:
        error = in_words(failure)
    if error is not None:
        raise ArchitectureError(
            f"{type(model).__name__}: the output head on the last hidden states does not give the model's "
            f"logits ({error.replace('states', 'logits')}). TOPD reads a linear head with a bias, a scale and a "
            "soft cap; please report the model."
        )


def stop_unless_generates(model: Any, sample: Sample) -> None:
    """`generate` must choose the tokens that are the most likely without a cache."""
    name = type(model).__name__
    try:
        ids, _, response, _ = generated(model, [sample.rollouts.prefix(1, 0)])
    except Exception as error:
        raise ArchitectureError(f"{name} cannot generate text: {in_words(error)}.") from error
    share = 0.8 if sample.window_states.dtype in TOLERANCE else 1.0
    below = sample.below_best(model, ids[0], response[0], share)
    if below is not None:
        raise ArchitectureError(
            f"{name} does not generate what it computes without a cache: `generate` chooses tokens {below}. "
            "Please report the model to transformers."
        )


def generated(model: Any, prompts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, SamplingStates]:
    """Greedy responses: prompt ids and mask, responses, and what was kept."""
    ids, mask = left_padded(prompts, padding_of(model))
    states = SamplingStates()
    with states.keeping(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=RESPONSE, do_sample=False, disable_compile=True,
            pad_token_id=padding_of(model),
        )  # fmt: skip
    return ids, mask, output[:, ids.shape[1] :], states


def gradient_error(
    backbone: nn.Module, way: Callable[[], Tensor], truth: Callable[[], Tensor], parameters: list[nn.Parameter]
) -> str | None:
    """How far a way's gradients of small parameters are from the truth, in words; None if that is rounding.

    States can agree where gradients do not (a bias is left out, and zero so far).
    """
    found, expected = gradients_of(way, parameters), gradients_of(truth, parameters)
    largest = max((float(gradient.norm()) for gradient in expected), default=0.0)
    tolerance = 0.3 if next(backbone.parameters()).dtype in TOLERANCE else 1e-2
    for ours, theirs in zip(found, expected, strict=True):
        difference = float((ours - theirs).norm() / (theirs.norm() + 1e-3 * largest + 1e-30))
        if not difference <= tolerance:
            return f"gradients differ by {difference:.2g}"
    return None


def in_words(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first if len(first) < 100 else first[:97] + '...'}"
