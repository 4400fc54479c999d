"""Windows decoded over one prefix are, token for token, those of one-by-one `generate`."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from special_models import ATTENTION, RECURRENT, special_model
from tiny import tiny_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from topd.near_future import (
    DistilledModel,
    LocalModel,
    Places,
    Prefill,
    Rollouts,
    continuations,
    recurrent_states,
    ways_of,
)
from topd.near_future.branches import prefill
from topd.near_future.continuations import follow_rollout

EOS = 1
SIZES = {
    "vocab_size": 47, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": EOS,
    "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "qwen3": lambda: tiny_model(0, scale=1.5),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}
SHARING = ["qwen3", "qwen3-moe", "llama", "gemma", "mistral"]


def model_of(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval() if kind in MODELS else special_model(kind)
    with torch.no_grad():  # sharper than random, so that windows follow rollouts for a while
        model.get_output_embeddings().weight.mul_(6.0)
    return model


def rollouts_of(model, seed=1, padding=True):
    """Three prompts, of different lengths, and responses that the model itself sampled (EOS may end them)."""
    torch.manual_seed(seed)
    lengths = [3, 6, 5] if padding else [6, 6, 6]
    prompts = [torch.randint(3, 47, (n,)) for n in lengths]
    windows = LocalModel(model, 0, [EOS], temperature=1.0).continue_(prompts, 14)
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (6 - len(p), 0)) for p in prompts])
    ids = torch.stack([torch.nn.functional.pad(p, (6 - len(p), 0)) for p in prompts])
    response_mask = windows.mask.long()
    response_mask[1, 9:] = 0  # one was cut short
    return Rollouts(ids, mask, windows.tokens * response_mask, response_mask, response_mask)


def greedy_of(model, reading):
    return model.get_output_embeddings()(reading.hidden).argmax(-1)


def known(model, reading, scored=None):
    """A prefill with the model's greedy tokens, as scoring finds them."""
    return replace(reading, greedy=greedy_of(model, scored or reading))


def generated(model, prefix, length, eos=EOS):
    out = model.generate(
        input_ids=prefix[None], attention_mask=torch.ones_like(prefix)[None], max_new_tokens=length, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prefix) :].tolist()


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("kind", SHARING)
def test_same_tokens_as_generate_one_by_one(kind, padding):
    model = model_of(kind)
    assert ways_of(model).shared_prefix == math.inf
    rollouts = rollouts_of(model, int(padding), padding)
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)  # every position, the first and the last too
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    reading = pair.prefill(rollouts)
    windows = pair.continue_(Places(rollouts, rows, positions), 7, known(model, reading))
    for row, position, tokens, mask in zip(rows, positions, windows.tokens, windows.mask, strict=True):
        alone = generated(model, rollouts.prefix(int(row), int(position)), 7)
        assert tokens[mask].tolist() == alone


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3-next"])
def test_groups_of_similar_length_are_read_as_all_rollouts_at_once(kind):
    model = model_of(kind)
    rollouts = rollouts_of(model)
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)
    places, mask = Places(rollouts, rows, positions), rollouts.response_mask.bool()
    read, results = [], []
    for size in (2, 8):
        pair = DistilledModel(model, LocalModel(model, 0, [EOS]), micro_batch=size)
        with watched(model, read):
            reading = pair.prefill(rollouts)
        windows = pair.continue_(places, 7, known(model, reading))
        results.append((reading.hidden[mask], pair.hidden(rollouts)[mask], windows.tokens))
    lengths = rollouts.lengths.sort().values.tolist()
    assert len(set(lengths)) == 3
    assert read == [(2, lengths[1]), (1, lengths[2]), (3, lengths[2])]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", ["qwen3-moe", "qwen3.5", "falcon-h1"])
def test_nothing_but_open_branches_is_decoded(kind, monkeypatch):
    monkeypatch.setattr(continuations, "LEAVE", 1.0)
    model = model_of(kind)
    rollouts = rollouts_of(model)
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)
    chosen = (rows == 2) | (positions == 0)  # all of one rollout, one of each other
    places = Places(rollouts, rows[chosen], positions[chosen])
    pair, shapes = DistilledModel(model, LocalModel(model, 0, [EOS])), []
    reading = pair.prefill(rollouts)
    with watched(model, shapes):
        windows = pair.continue_(places, 7, known(model, reading))
    fed = [rows for rows, tokens in shapes if tokens == 1 < rows]  # a rollout alone is read again for its states
    assert len(places) >= fed[0] > fed[-1], fed
    for row, position, tokens, mask in zip(places.rows, places.positions, windows.tokens, windows.mask, strict=True):
        assert tokens[mask].tolist() == generated(model, rollouts.prefix(int(row), int(position)), 7)


@contextmanager
def watched(model, shapes):
    """Record the shapes of the token ids that the backbone reads."""
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with hook:
        yield


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("length", [1, 7])
def test_windows_from_the_candidate_are_the_candidate_and_what_generate_adds_to_it(share_prefix, length):
    model = model_of("llama")
    rollouts = rollouts_of(model)
    eos = int(rollouts.response_ids[0, 3])  # so that some candidates end their response
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)
    pair = DistilledModel(model, LocalModel(model, 0, [eos]), share_prefix=share_prefix)
    reading = pair.prefill(rollouts)
    greedy = greedy_of(model, reading)
    windows = pair.continue_(
        Places(rollouts, rows, positions), length, replace(reading, greedy=greedy), from_candidate=True
    )
    ended = 0
    for row, position, tokens, mask in zip(rows, positions, windows.tokens, windows.mask, strict=True):
        prefix = rollouts.prefix(int(row), int(position) + 1)
        expected = [int(prefix[-1])]
        if expected != [eos] and length > 1:
            expected += generated(model, prefix, length - 1, eos)
        ended += expected == [eos]
        assert tokens[mask].tolist() == expected
    assert ended


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_the_attention_of_the_model(attention):
    model = model_of("llama")
    model.set_attn_implementation(attention)
    rollouts = rollouts_of(model)
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    reading = pair.prefill(rollouts)
    rows, positions = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 4])
    windows = pair.continue_(Places(rollouts, rows, positions), 5, known(model, reading))
    for i in range(3):
        alone = generated(model, rollouts.prefix(int(rows[i]), int(positions[i])), 5)
        assert windows.tokens[i][windows.mask[i]].tolist() == alone
    assert model.config._attn_implementation == attention


def test_windows_that_follow_the_rollout_cost_no_forward_pass():
    """A greedy rollout: every window is the rollout's own path, known from scoring, as far as the rollout goes."""
    model = model_of("llama")
    prompt = torch.randint(3, 47, (2, 4))
    response = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    response = response[:, 4:]
    ones = torch.ones_like(response)
    rollouts = Rollouts(prompt, torch.ones_like(prompt), response, ones, ones)
    reading = prefill(model.base_model, rollouts)
    source = LocalModel(model, 0, [])
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    rows, positions = torch.tensor([0, 0, 1]), torch.tensor([0, 5, 2])
    windows = source.continue_over_prefix(Places(rollouts, rows, positions), 6, known(model, reading))
    assert not calls
    for row, position, tokens in zip(rows, positions, windows.tokens, strict=True):
        assert tokens.tolist() == response[row, position : position + 6].tolist()
    source.continue_over_prefix(Places(rollouts, rows, positions + 3), 6, known(model, reading))
    assert len(calls) == 2  # the second window reaches 2 tokens beyond the end of its rollout


def test_windows_that_leave_the_rollout_at_the_same_place_share_a_branch():
    model = model_of("llama")
    rollouts = rollouts_of(model, padding=False)
    reading = prefill(model.base_model, rollouts)
    greedy = rollouts.response_ids.clone()
    greedy[0, 5] += 1  # the first three agree with the rollout until position 5 and part there
    rows, positions = torch.zeros(4, dtype=torch.long), torch.tensor([2, 3, 5, 6])
    fed = []
    model.base_model.register_forward_hook(lambda m, a, k, o: fed.append(k["input_ids"].shape), with_kwargs=True)
    windows = LocalModel(model, 0, []).continue_over_prefix(
        Places(rollouts, rows, positions), 6, replace(reading, greedy=greedy)
    )
    assert all(shape[1] <= 2 for shape in fed)  # one branch for the first three, at most one more
    assert windows.tokens[0, 3:].tolist() == windows.tokens[2, :3].tolist()
    assert windows.tokens[1, 2:].tolist() == windows.tokens[2, :4].tolist()


def test_known_tokens_by_hand():
    response = torch.tensor([[7, 8, 9, 5]])
    ones = torch.ones_like(response)
    rollouts = Rollouts(torch.tensor([[3]]), torch.tensor([[1]]), response, ones, ones)
    greedy = torch.tensor([[7, 8, 6, 5]])
    start = follow_rollout(Places(rollouts, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 3])), greedy, 3)
    assert start.known.tolist() == [3, 2, 1, 1]
    assert start.tokens[0].tolist() == [7, 8, 6]
    assert start.tokens[1, :2].tolist() == [8, 6]


@pytest.mark.parametrize(
    ("kind", "padding"),
    [(kind, True) for kind in [*ATTENTION, *RECURRENT]]
    + [(kind, False) for kind in ("mistral-sliding", "deepseek-v3", "qwen3.5", "falcon-h1")],
)
def test_special_attention_and_recurrent_layers_decode_over_one_prefix_as_generate_does(kind, padding):
    """Prefixes are shorter and longer than a sliding window of 8; windows of 12 outgrow it."""
    model = special_model(kind)
    assert ways_of(model).shared_prefix == math.inf
    rollouts = rollouts_of(model, padding=padding)
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    reading = pair.prefill(rollouts)
    rows, positions = (places[::5] for places in rollouts.response_mask.nonzero(as_tuple=True))
    windows = pair.continue_(Places(rollouts, rows, positions), 12, known(model, reading))
    for row, position, tokens, mask in zip(rows, positions, windows.tokens, windows.mask, strict=True):
        assert tokens[mask].tolist() == generated(model, rollouts.prefix(int(row), int(position)), 12)


@pytest.mark.parametrize("kind", [*RECURRENT])
def test_recurrent_layers_read_a_rollout_once_for_all_of_its_windows(kind):
    model = special_model(kind)
    rollouts = rollouts_of(model, padding=False)[:1]
    ones = torch.ones_like(rollouts.response_ids)
    rollouts = replace(rollouts, response_mask=ones, loss_mask=ones)  # EOS may have ended it early
    reading = prefill(model.base_model, rollouts)
    fed = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows, positions = torch.zeros(3, dtype=torch.long), torch.tensor([1, 2, 7])
    scored = replace(reading, greedy=rollouts.response_ids.remainder(46) + 1)  # every window leaves its rollout at once
    LocalModel(model, 0, []).continue_over_prefix(Places(rollouts, rows, positions), 4, scored)
    prompt = rollouts.prompt_ids.shape[1]
    segments = [(1, prompt + 1), (1, 1), (1, 5)]  # of the rollout, each token once
    together = kind == "falcon-h1"  # each layer holds attention beside its recurrent part
    reads = segments if together else [(1, prompt + 7)]
    assert fed[: len(reads)] == reads
    assert set(fed[len(reads) :]) == {(3, 1)}


@pytest.mark.parametrize("kind", ["qwen3.5", "lfm2", "mamba2"])
def test_recurrent_layers_alone_run_in_segments(kind):
    """Attention, experts and norms of a hybrid model read the rollout in one piece, and hooks stay in place."""
    model = special_model(kind)
    rollouts = rollouts_of(model, padding=False)[:1]
    cache = recurrent_states.empty_cache(model.base_model)
    mixers = recurrent_states.mixers_of(model.base_model, cache)
    assert sorted(mixers) == [n for n, layer in enumerate(cache.layers) if hasattr(layer, "conv_states")]
    mixer, lengths = next(iter(mixers.values())), []
    usual = mixer.forward

    def hooked(hidden_states, *args, **kwargs):
        lengths.append(hidden_states.shape[1])
        return usual(hidden_states, *args, **kwargs)

    mixer.forward = hooked
    start = rollouts.prompt_ids.shape[1] + torch.tensor([1, 2, 7, 2])
    states = recurrent_states.states_at(model.base_model, rollouts, torch.zeros_like(start), start)
    assert lengths == [int(start[0]), 1, 5]
    assert mixer.forward is hooked
    for branch, end in enumerate(start):
        alone = recurrent_states.empty_cache(model.base_model)
        model(
            input_ids=rollouts.input_ids[:, :end],
            use_cache=True,
            **{recurrent_states.cache_argument(model.base_model): alone},
        )
        for number in mixers:
            for name in ("conv_states", "recurrent_states"):
                found, expected = (getattr(part.layers[number], name)[0] for part in (states, alone))
                assert (found is None) == (expected is None)
                if found is not None:
                    torch.testing.assert_close(found[branch], expected[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("counts", "expected"), [([2, 2, 2, 1], [(0, 2), (2, 4)]), ([5, 1, 1, 1], [(0, 1), (1, 4)])])
def test_recurrent_states_of_few_branches_are_in_memory_together(counts, expected, monkeypatch):
    """A branch of a large model has tens of megabytes of states."""
    monkeypatch.setattr(recurrent_states, "BRANCHES_AT_ONCE", 4)
    model = special_model("qwen3.5")
    found = recurrent_states.rows_at_once(model.base_model, counts)
    assert [(rows.start, rows.stop) for rows in found] == expected
    assert list(recurrent_states.rows_at_once(model_of("llama").base_model, counts)) == [slice(0, 4)]


def test_groups_of_recurrent_branches_give_the_same_windows(monkeypatch):
    model = special_model("qwen3.5")
    rollouts = rollouts_of(model)
    reading = prefill(model.base_model, rollouts)
    rows, positions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1, 5, 3, 0, 2, 6])
    inputs = Places(rollouts, rows, positions), 9, known(model, reading)
    together = LocalModel(model, 0, [EOS]).continue_over_prefix(*inputs)
    monkeypatch.setattr(recurrent_states, "BRANCHES_AT_ONCE", 2)
    fed = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert torch.equal(LocalModel(model, 0, [EOS]).continue_over_prefix(*inputs).tokens, together.tokens)
    assert max(fed) <= 2, "also the branches of one rollout"


def test_a_layer_that_reads_its_mask_takes_the_plain_way_and_is_right():
    model = model_of("llama")
    layer = model.model.layers[1].self_attn
    usual = layer.forward
    layer.forward = lambda *args, attention_mask=None, **kwargs: usual(
        *args, attention_mask=None if attention_mask is None else attention_mask.clone(), **kwargs
    )
    with pytest.warns(UserWarning, match="generated from fresh prefixes"):
        rollouts = rollouts_of(model)  # the first use of the model
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    reading = pair.prefill(rollouts)
    assert reading.prefix is None
    rows, positions = torch.tensor([0, 2]), torch.tensor([3, 1])
    windows = pair.continue_(Places(rollouts, rows, positions), 6, known(model, reading))
    for i in range(2):
        alone = generated(model, rollouts.prefix(int(rows[i]), int(positions[i])), 6)
        assert windows.tokens[i][windows.mask[i]].tolist() == alone


def test_no_windows_are_no_windows():
    model = model_of("llama")
    rollouts = rollouts_of(model)
    nothing = torch.zeros(0, dtype=torch.long)
    windows = LocalModel(model, 0, [EOS]).continue_over_prefix(
        Places(rollouts, nothing, nothing),
        5,
        replace(prefill(model.base_model, rollouts), greedy=rollouts.response_ids),
    )
    assert windows.tokens.shape == (0, 5)


def test_rows_of_a_prefill():
    reading = Prefill({"hidden": torch.arange(6.0).view(3, 2, 1)}, [(torch.zeros(3, 1, 4, 2), torch.ones(3, 1, 4, 2))])
    part = reading[1:]
    assert part.hidden[:, 0, 0].tolist() == [2.0, 4.0]
    assert part.prefix[0][1].shape == (2, 1, 4, 2)
    with pytest.raises(AssertionError, match="not sliced"):
        replace(reading, parts=(reading,))[1:]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_windows_decode_under_autocast(kind):
    """The prefix may be kept under autocast or outside of it; nearly all bf16 windows are the float32 ones."""
    model = model_of(kind)
    torch.manual_seed(0)
    ids = torch.randint(3, 47, (2, 25))
    ones = torch.ones_like(ids)
    rollouts = Rollouts(ids[:, :5], ones[:, :5], ids[:, 5:], ones[:, 5:], ones[:, 5:])
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    rows, positions = ones[:, 5:].nonzero(as_tuple=True)
    exact = pair.prefill(rollouts)
    expected = pair.continue_(Places(rollouts, rows, positions), 6, known(model, exact))
    with torch.autocast("cpu", torch.bfloat16):
        for reading in (exact, pair.prefill(rollouts)):
            found = pair.continue_(Places(rollouts, rows, positions), 6, known(model, reading, exact))
            assert (found.tokens == expected.tokens).all(-1).float().mean() > 0.8


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_prefixes_whose_keys_and_values_differ_in_dtype_decode(dtypes):
    """Autocast leaves float32 keys (they are rotated) and bf16 values, and transformers 5.24 keeps both as they are."""
    model = model_of("qwen3")
    rollouts = rollouts_of(model)
    source, reading = LocalModel(model, 0, [EOS]), prefill(model.base_model, rollouts)
    mixed = replace(reading, prefix=[(keys.to(dtypes[0]), values.to(dtypes[1])) for keys, values in reading.prefix])
    rows, positions = rollouts.response_mask.nonzero(as_tuple=True)
    exact, found = (
        source.continue_over_prefix(Places(rollouts, rows, positions), 6, known(model, each, reading))
        for each in (reading, mixed)
    )
    assert (found.tokens == exact.tokens).all(-1).float().mean() > 0.8
