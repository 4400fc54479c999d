"""What is logged arrives in TensorBoard, Weights & Biases (offline) and trackio, value by value."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_trainer

Series = dict[str, list[float]]
"""By the tracker's name of a metric, its values in the order of steps."""

BLOCK, HEADER = 32_768, 7


def from_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def from_wandb(folder: Path) -> Series:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()  # as at the end of a process
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: Series = {}
    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                found.setdefault(item.key or "/".join(item.nested_key), []).append(value)
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format (checksum, length, kind: whole, first, middle, last), after 7 bytes of wandb's own."""
    at, parts = 7, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def from_trackio(folder: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    found: Series = {}
    for row in sorted(SQLiteStorage.get_logs("topd-test", "one"), key=lambda row: row["step"]):
        for key, value in row.items():
            if isinstance(value, int | float):
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "read"), [("tensorboard", from_tensorboard), ("wandb", from_wandb), ("trackio", from_trackio)]
)
def test_every_metric_arrives(
    name: str, read: Callable[[Path], Series], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'topd[trackers]')")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trainer = tiny_trainer(tmp_path / "run", max_steps=2, report_to=[name], run_name="one", project="topd-test")
    trainer.train()
    trainer.end()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    arrived = read(tmp_path)
    expected = {name for name in logged[0] if "/" in name} | {"loss"}
    assert len(expected) > 20
    for key in expected:
        assert arrived[f"train/{key}"] == pytest.approx([entry[key] for entry in logged if key in entry], rel=1e-5), key
