"""`from topd import ...`: every name resolves, is imported on first use, and is typed."""

import subprocess
import sys
from pathlib import Path

import pytest

import topd
from topd import algorithm

SRC = Path(topd.__file__).parents[1]


def test_every_name_is_the_object_that_its_module_defines():
    assert set(algorithm.__all__) < set(topd.__all__)
    assert {"TOPDConfig", "TOPDTrainer", "MOPDTrainer", "WarmStartConfig", "WarmStartTrainer"} < set(topd.__all__)
    for name in topd.__all__:
        assert name == "__version__" or getattr(topd, name).__module__.startswith("topd.")
    assert len(set(topd.__all__)) == len(topd.__all__)
    assert set(topd.__all__) <= set(dir(topd))
    with pytest.raises(AttributeError, match="no attribute 'TOPDTrianer'"):
        topd.TOPDTrianer  # noqa: B018


def test_import_takes_under_0_3_s_and_imports_no_torch():
    code = (
        "import sys, time; t = time.perf_counter(); import topd; print(time.perf_counter() - t, 'torch' in sys.modules)"
    )
    results = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "123"]
    seconds, torch = zip(*(result.stdout.split() for result in results), strict=True)
    assert set(torch) == {"False"}
    assert min(map(float, seconds)) < 0.3


def test_type_checkers_see_the_classes(tmp_path):
    """mypy on a user's program. What the package imports is not followed: it would take minutes.

    In a process of its own: its trees would stay here, and garbage is collected in every training.
    """
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import topd\n"
        "from topd import TOPDConfig, Transport, WarmStartConfig\n"
        "config = TOPDConfig('out', window_length=3)\n"
        "reveal_type(config)\n"
        "reveal_type(config.window_length)\n"
        "reveal_type(WarmStartConfig('out').kd_ratio)\n"
        "reveal_type(topd.MOPDTrainer)\n"
        "reveal_type(Transport)\n"
        "topd.TOPDTrianer\n"
    )
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        f"[mypy]\nmypy_path = {SRC}\nignore_missing_imports = true\nfollow_imports = skip\n"
        "[mypy-topd.*]\nfollow_imports = silent\n[mypy-dataclasses.*,typing.*]\nfollow_imports = normal\n"
    )
    options = ["--config-file", str(settings), "--cache-dir", str(tmp_path / "cache"), str(program)]
    said = subprocess.run([sys.executable, "-m", "mypy", *options], capture_output=True, text=True).stdout
    assert 'Revealed type is "topd.training.config.TOPDConfig"' in said
    assert said.count('Revealed type is "int"') == 1
    assert 'Revealed type is "float"' in said
    assert "topd.training.several_teachers.MOPDTrainer" in said
    assert "topd.algorithm.transport.Transport" in said
    assert '"TOPDTrianer"' in said  # Module has no attribute
