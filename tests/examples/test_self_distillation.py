"""`examples/self_distillation.py`: what it writes is what src/topd/recipes/self-distillation.yaml needs."""

import json
from pathlib import Path
from types import ModuleType

from topd.embedded.task import is_correct, read_problem
from topd.embedded.tokenizer import build_tokenizer
from topd.loading.data import load_prompts
from topd.loading.rows import TEACHER_PROMPT, read_teacher_prompt

EXAMPLE = Path(__file__).parents[2] / "examples" / "self_distillation.py"


def test_the_solution_is_in_the_teacher_s_prompt_only_and_the_data_teaches_to_use_it(tmp_path):
    module = ModuleType("self_distillation")
    exec(compile(EXAMPLE.read_text(), str(EXAMPLE), "exec"), module.__dict__)
    module.main(tmp_path, count=60)
    tokenizer = build_tokenizer()
    for name in ("train", "held-out"):
        rows = load_prompts(str(tmp_path / f"{name}.jsonl"), also={TEACHER_PROMPT: read_teacher_prompt})
        for row in rows:
            problem = read_problem(row["prompt"])
            assert problem is not None
            assert problem.held_out == (name == "held-out")
            solution = row["teacher_prompt"].removesuffix(f".{row['prompt']}")
            assert is_correct(solution, problem.answer)
            assert tokenizer.unk_token_id not in tokenizer(row["teacher_prompt"])["input_ids"]
    reads = [json.loads(line) for line in (tmp_path / "reads.jsonl").read_text().splitlines()]
    right = [is_correct(row["response"], read_problem("what is" + row["prompt"].split("what is")[1]).answer)
             for row in reads]  # fmt: skip
    assert all(right[1::2])
    assert sum(right[::2]) < 45
