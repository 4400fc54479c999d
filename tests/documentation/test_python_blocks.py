"""Every block of Python in the README and docs/ runs as it stands, with small stand-ins for what is on the Hub."""

import functools

import documents
import pytest

import topd.training
from topd.training.config import TOPDConfig

HUB = {
    "Qwen/Qwen3-0.6B": "embedded:student-easy",
    "Qwen/Qwen3-1.7B": "embedded:teacher",
    "lm:student": "embedded:student-easy",
}
SMALL = {
    "max_completion_length": 24, "window_length": 4, "max_steps": 1, "bf16": False, "gradient_checkpointing": False,
    "use_cpu": True, "report_to": "none",
}  # fmt: skip
"""Options that a block does not give: the stand-ins are small, and so is the machine."""
BLOCKS = [
    pytest.param(block, id=f"{documents.name_of(page)}-{number}")
    for page in documents.PAGES
    for number, block in enumerate(documents.blocks(page, "python"))
]


def conversations(*_, **__):
    """In the place of a Hub dataset: rows as OpenThoughts has them."""
    return [{"domain": "math", "conversations": [{"from": "human", "value": f"What is {i}+1?"}]} for i in range(40)]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", conversations)

    @functools.wraps(TOPDConfig)
    def small(*args, **given):
        return TOPDConfig(*args, **(SMALL | given))

    monkeypatch.setattr(topd.training, "TOPDConfig", small)
    for name, stand_in in HUB.items():
        block = block.replace(name, stand_in)
    values = {}
    exec(compile(block, "block", "exec"), values)  # the project's own documents
    trainer = values.get("trainer")
    assert trainer is None or trainer.state.global_step >= 1
