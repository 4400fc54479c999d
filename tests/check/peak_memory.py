"""The memory estimate beside what a process takes: `python tests/check/peak_memory.py METHOD BF16 CHECKPOINTING
BATCH TOKENS`, as in `topd false true 8 256`. A random Qwen3 pair of 42 M and 110 M parameters, two steps, CPU."""

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from topd.check import machine as memory
from topd.cli.check import parsed
from topd.cli.options import prompts
from topd.cli.train import setups_of
from topd.embedded.pair import pair_folder
from topd.training import TOPDTrainer


def make(folder, width, layers, feed_forward):
    config = Qwen3Config(
        vocab_size=32768, hidden_size=width, intermediate_size=feed_forward, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, head_dim=64, num_hidden_layers=layers, max_position_embeddings=2048,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(pair_folder("teacher") / name, folder / name)
    return str(folder)


def estimate_and_peak(out, method, bf16, checkpointing, batch, tokens):
    """Bytes."""
    names = make(out / "student", 512, 8, 1536), make(out / "teacher", 768, 12, 2304)
    options = {
        "model_name_or_path": names[0], "teacher_model_name_or_path": names[1], "output_dir": out / "run",
        "method": method, "bf16": bf16, "gradient_checkpointing": checkpointing, "per_device_train_batch_size": batch,
        "max_completion_length": tokens, "max_steps": 2, "save_strategy": "no", "report_to": "none",
        "window_length": 16, "disable_tqdm": "true", "student_window": "rollout",
        "data": "embedded",
    }  # fmt: skip
    data, config, model = parsed([part for name, value in options.items() for part in (f"--{name}", str(value))])
    setup = setups_of(data, config, model)[""]
    phases = memory.needs(setup, *[memory.shape(each, setup.dtypes[each.role]) for each in setup.pair])
    always = sum(phases.pop("always").values())
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    TOPDTrainer(*names, config, train_dataset=prompts("embedded", "", 64), processing_class=tokenizer).train()
    done.set()
    return always + max(sum(parts.values()) for parts in phases.values()), peak[0] - before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        expected, measured = estimate_and_peak(Path(folder), *sys.argv[1:])
    print(f"estimate {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB, ratio {expected / measured:.2f}")
