"""Text from models, servers, data and paths, safe to show on a terminal and on a page."""

_PICTURES: dict[int, int | str] = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_PICTURES |= {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
_ORDER = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that change the display order of the letters around them."""
_PICTURES |= {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), *_ORDER)}


def slug(name: str) -> str:
    """A name for a folder, file or anchor: everything but letters and digits becomes a hyphen."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def visible(value: object) -> str:
    """Text without active characters: C0 controls become their pictures, C1 controls and direction marks their escapes,
    unpaired surrogates question marks. Tabs and line ends stay."""
    return str(value).translate(_PICTURES).encode("utf-8", "replace").decode("utf-8")
