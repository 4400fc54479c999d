"""Teacher solutions: cleaned, written, and loaded for the warm start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topd.errors import DataError, TOPDError
from topd.loading.data import PLAIN, Source, load_prompts, source_name
from topd.loading.rows import DataForm, has_half_character, read_flag
from topd.runs.files import replacing, write_records


def clean(
    records: list[dict[str, Any]], answers: list[str | None], rule: Any
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows for training, and counts of kept and dropped responses.

    `records` have `prompt`, `text` and `truncated`; `answers` are the wanted answer of each, None if unknown. `rule`:
    keep only right answers by this rule (see `evaluation.answers`); None: all. Rows have `prompt`, `completion`,
    `truncated` and, if known, `answer`; repeated and blank responses are left out, and with a rule wrong ones.
    """
    from topd.evaluation.answers import verdict

    rows: list[dict[str, Any]] = []
    kinds = ("solutions", "of them truncated", "repeated", "blank", "half a character", "wrong", "without an answer")
    counts = dict.fromkeys(kinds, 0)
    seen: set[tuple[str, str]] = set()
    for record, answer in zip(records, answers, strict=True):
        key = str(record["prompt"]), record["text"]
        found = verdict(record["text"], answer, rule) if rule and answer is not None else None
        if not record["text"].strip():
            counts["blank"] += 1
        elif has_half_character(record["text"]):  # UTF-8 cannot encode it, and `topd warmstart` refuses it
            counts["half a character"] += 1
        elif key in seen:
            counts["repeated"] += 1
        elif found is not None and not found.right:
            counts["wrong" if found.parsed else "without an answer"] += 1
        else:
            counts["solutions"] += 1
            counts["of them truncated"] += record["truncated"]
            row = {"prompt": record["prompt"], "completion": record["text"], "truncated": record["truncated"]}
            rows.append(row if answer is None else row | {"answer": answer})
        seen.add(key)
    return rows, {what: count for what, count in counts.items() if count or what == "solutions"}


def write_solutions(rows: list[dict[str, Any]], out: Path) -> None:
    """Write a .jsonl or .parquet file; see `replacing`. Raises `TOPDError` if there are no rows."""
    if not rows:
        raise TOPDError(f"No solution is left to write to {out}. Look at the responses in {out.stem}.records.jsonl.")
    if out.suffix != ".parquet":
        write_records(rows, out)
        return
    import pyarrow
    import pyarrow.parquet

    with replacing(out) as aside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), aside)


def load_solutions(
    source: Source, *, split: str = "train", limit: int | None = None, truncated: bool = False, form: DataForm = PLAIN
) -> Any:
    """Prompts and completions in TRL's form, text or messages, from any source that `load_prompts` takes.

    `truncated`: keep responses that the length limit truncated. They would teach the student to stop there, because
    every completion gets an end token. Raises `DataError` if a row is broken, or none is left.
    """
    data = load_prompts(source, split=split, limit=limit, responses=True, also={"truncated": read_flag}, form=form)
    kept = data if truncated else data.filter(lambda row: not row["truncated"], desc="Dropping truncated solutions")
    if not len(kept):
        raise DataError(
            f"{source_name(source)!r}: all {len(data)} solutions are truncated. Generate with more --max-new-tokens."
        )
    kept = kept.select_columns(["prompt", "response"]).rename_column("response", "completion")
    if isinstance(kept[0]["prompt"], str):
        return kept
    return kept.map(lambda row: {"completion": [{"role": "assistant", "content": row["completion"]}]}, desc="Messages")
