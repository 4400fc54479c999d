"""Text from models, servers, data and paths, safe to show on a terminal and on a page."""

from __future__ import annotations

_PICTURES: dict[int, int | str] = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_PICTURES |= {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
_ORDER = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Marks, embeddings, overrides and isolates that change the order in which the letters around them are shown."""
_PICTURES |= {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), *_ORDER)}


def visible(value: object) -> str:
    """Text in which nothing acts: C0 controls (the escape character) become their pictures, C1 controls and changes of
    direction their escapes, half a surrogate pair a question mark. Tabs and line ends stay."""
    return str(value).translate(_PICTURES).encode("utf-8", "replace").decode("utf-8")
