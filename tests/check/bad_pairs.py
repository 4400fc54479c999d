"""Pairs that do not fit, made from the embedded one: `python tests/check/bad_pairs.py FOLDER` writes them all."""

import json
import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from topd.embedded.pair import pair_folder


def copy_of(role, folder):
    shutil.copytree(pair_folder(role), folder, dirs_exist_ok=True)
    return folder


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def swap_two_tokens(folder):
    """Two tokens have each other's ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    file.write_text(json.dumps(content))
    return folder


def other_tokenizer(folder):
    """The teacher, with two tokens that have each other's ids."""
    copy_of("teacher", folder)
    return swap_two_tokens(folder)


def other_splitting(folder):
    """The same vocabulary, but words are split without the spaces around them."""
    copy_of("teacher", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["pattern"] = {"Regex": r" ?[a-z]+|[^a-z]"}
    file.write_text(json.dumps(content))
    return folder


def other_end(folder):
    """It ends its turns with another token too, and its conversations begin with a word of their own."""
    copy_of("teacher", folder)
    change(folder / "generation_config.json", eos_token_id=[1, 2])
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ ' first ' }}" + template)
    return folder


def short_context(folder):
    copy_of("teacher", folder)
    change(folder / "config.json", max_position_embeddings=64)
    return folder


def padded_head(folder, rows=64, role="teacher"):
    """A head with more rows than there are tokens; the tokens keep theirs."""
    copy_of(role, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    return folder


def conversations(file):
    """Prompts as messages."""
    texts = [f"what is {a}+{b}×{c}?" for a in range(1, 5) for b in range(1, 5) for c in range(1, 5)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for make in (other_tokenizer, other_splitting, other_end, short_context, padded_head):
        make(out / make.__name__)
    conversations(out / "conversations.jsonl")
