"""The tokenizer of the embedded pairs: one token per word, digit or sign, with an exact round trip."""

from __future__ import annotations

import itertools
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topd.embedded.task import PHRASES, STUDENTS, TEACHER, Level, make_problems, write_solution

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + EOS + "{% endif %}{% endfor %}"
)
MAX_LENGTH: dict[Level, int] = {"short": 256, "long": 512}
_PIECE = Regex(r" ?[a-z]+ ?|[^a-z]")


def build_tokenizer(level: Level = "short") -> PreTrainedTokenizerFast:
    """Make the tokenizer from the task's own text (deterministic; about 50 tokens; "long" adds the brackets)."""
    splitter = pre_tokenizers.Split(_PIECE, behavior="isolated")
    rng = random.Random(0)
    text = ["what is 0123456789+-×=.,? "] + [p for slot in PHRASES.values() for p in slot]
    for problem, style in itertools.product(make_problems(200, 0, held_out=False), (TEACHER, *STUDENTS.values())):
        text.append(problem.prompt + write_solution(problem, style, rng))
    pieces = sorted({piece for line in text for piece, _ in splitter.pre_tokenize_str(line)})
    brackets = ["(", ")"] if level == "long" else []
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNK, *pieces, *brackets])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="left",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=MAX_LENGTH[level],
    )  # fmt: skip
