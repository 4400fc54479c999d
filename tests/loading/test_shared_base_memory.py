"""Resident memory of a student's adapter and a teacher's: on one base, and on two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import psutil, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny import TOKENIZER, tiny_config
from topd.loading.pair import prepared_models
folder = Path(sys.argv[1])
ids = torch.arange(3, 40)[None]
process = psutil.Process()
before = process.memory_info().rss
teacher = folder / ("teacher" if sys.argv[2] == "one" else "teacher-merged")
pair = prepared_models(str(folder / "student"), str(teacher), tiny_config(folder / "run"), TOKENIZER)
teacher = pair.teacher
if isinstance(teacher, str):
    from transformers import AutoModelForCausalLM
    teacher = AutoModelForCausalLM.from_pretrained(teacher)
with torch.no_grad():
    pair.student(ids), teacher(ids)
print(json.dumps({"shared": pair.shared, "mb": (process.memory_info().rss - before) / 1e6}))
"""


@pytest.mark.slow
def test_two_adapters_on_one_base_take_the_memory_of_one_model(tmp_path: Path) -> None:
    import torch
    from loading.test_shared_base import adapter_on
    from tiny import TOKENIZER

    from topd.cli.main import main
    from topd.demo.build import new_model

    torch.manual_seed(0)
    model = new_model(TOKENIZER, 512, 8)
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    weights = model.num_parameters() * 4 / 1e6
    for seed, name in enumerate(("student", "teacher")):
        adapter_on(tmp_path / "base", name, seed)
    assert main(["merge", str(tmp_path / "teacher"), "--out", str(tmp_path / "teacher-merged")]) == 0
    found = {}
    for kind in ("one", "two"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), kind, str(Path(__file__).parents[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    print(f"weights {weights:.0f} MB; resident: {found}")
    assert [found[kind]["shared"] for kind in ("one", "two")] == [True, False]
    assert 0.8 * weights < found["two"]["mb"] - found["one"]["mb"] < 1.3 * weights
