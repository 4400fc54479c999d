"""The teacher on a real vLLM server: TOPD_VLLM_PYTHON is the Python that has vLLM (docs/remote_teachers.md)."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import prompts, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.embedded.pair import pair_folder
from topd.embedded.task import make_problems
from topd.errors import ServerError
from topd.near_future import LocalModel, Places
from topd.near_future.sampling import sample_rollouts
from topd.teachers.openai_server import Limits, OpenAIServer
from topd.teachers.server_windows import connect
from topd.teachers.top_k import TopKTeacher
from topd.training import TOPDTrainer

PYTHON = os.environ.get("TOPD_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="TOPD_VLLM_PYTHON names no Python with vLLM (docs/remote_teachers.md)"),
]
STUDENT, TEACHER = str(pair_folder("student-standard")), str(pair_folder("teacher"))


@pytest.fixture(scope="module")
def server():
    """vLLM with the embedded teacher; it takes half a minute to come up, which a first client waits for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(
            str(PYTHON),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            TEACHER,
            "--served-model-name",
            "teacher",
        ),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"),
        *("--max-logprobs", "64", "--enforce-eager"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topd.teachers.openai_server.FIRST_CONTACT", 300.0)
        OpenAIServer(f"http://127.0.0.1:{port}").models()
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def test_vllm_continues_and_scores_as_the_model_in_this_process(server):
    """Greedy windows, token for token; log-probabilities to 1e-3 (another attention kernel, float32)."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in (STUDENT, TEACHER)
    )
    windows = connect(OpenAIServer(server[1], Limits(60, 300, 8)), tokenizer, [tokenizer.eos_token_id])
    assert (windows.model, windows.context) == ("teacher", 256)
    problems = [problem.prompt for problem in make_problems(16, 0, held_out=True)]
    rollouts = sample_rollouts(student, tokenizer, problems, max_new_tokens=80)
    rows, positions = (index[::5] for index in rollouts.loss_mask.bool().nonzero(as_tuple=True))
    prefixes = Places(rollouts, rows, positions).prefixes()
    assert len(prefixes) > 100
    found = windows.continue_(prefixes, 50)
    expected = LocalModel(teacher, tokenizer.pad_token_id, [tokenizer.eos_token_id]).continue_(prefixes, 50)
    equal = ((found.tokens == expected.tokens * expected.mask) & (found.mask == expected.mask)).all(1)
    print(f"{int(equal.sum())} of {len(equal)} windows are equal, {int(found.mask.sum())} tokens")
    assert equal.float().mean() > 0.98  # equally likely tokens may fall either way
    known = TopKTeacher(windows, known=20).known_tokens(rollouts)
    with torch.no_grad():
        logits = teacher(rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
    log_probs = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, known.tokens)
    there = rollouts.loss_mask.bool()[..., None] & (known.log_probs > -torch.inf)
    print(f"log-probabilities differ by {float((known.log_probs - log_probs)[there].abs().max()):.1e} at most")
    assert torch.allclose(known.log_probs[there], log_probs[there], atol=1e-3)


@pytest.mark.parametrize("weights", [True, False])
def test_training_with_vllm_is_training_with_the_local_teacher(tmp_path: Path, server, weights):
    def losses(teacher: str | None, **options) -> list[float]:
        args = tiny_config(
            tmp_path, per_device_train_batch_size=8, max_completion_length=64, window_length=50, candidate_share=0.05,
            learning_rate=3e-4, **options,
        )  # fmt: skip
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(STUDENT)
        trainer = TOPDTrainer(STUDENT, teacher, args, train_dataset=prompts(), processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    remote = losses(TEACHER if weights else None, teacher_model_server_url=server[1], loss_top_k=46)
    assert remote == pytest.approx(losses(TEACHER), rel=1e-3)


def test_a_server_that_dies_is_given_up(server):
    process, url = server
    windows = connect(OpenAIServer(url, Limits(10, 2, 4)), AutoTokenizer.from_pretrained(STUDENT), [1])
    process.terminate()
    process.wait(30)
    with pytest.raises(ServerError, match="has not answered for 2 s"):
        windows.continue_([torch.tensor([3, 4, 5])], 5)
