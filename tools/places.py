"""Generated blocks of a page: each stands between two comments that name it."""

import re
import textwrap


def filled(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its comments ``<!-- NAME: generated ... -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: the comments are not there, once each.
    """
    word = re.escape(name)
    pattern = re.compile(rf"(<!-- {word}: generated\b.*?-->\n).*?(<!-- end {word} -->)", re.DOTALL)
    new, count = pattern.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"expected one pair of {name} comments, found {count}")
    return new


def wrapped(text: str) -> str:
    """A paragraph, or an item of a list, in lines that a terminal shows; words and their hyphens stay whole."""
    under = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)
