"""Real text without a network: the documentation topics that every CPython ships."""

import re
from collections.abc import Sequence

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MARKUP = re.compile(r"[*`]+(?=\S)|(?<=\S)[*`]+")


def document() -> str:
    """All topics, one after another: about half a megabyte of English prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def sentences(count: int) -> list[str]:
    """`count` sentences, spread evenly over the document (fewer when it has fewer)."""
    found = []
    for paragraph in re.split(r"\n\s*\n", document()):
        flat = _MARKUP.sub("", " ".join(paragraph.split()))
        found += [s for s in _SENTENCE.split(flat) if 30 <= len(s) <= 400 and s[-1] in ".!?"]
    step = max(len(found) / count, 1.0)
    return [found[int(i * step)] for i in range(min(count, len(found)))]


def batches(texts: Sequence[str], size: int) -> list[list[str]]:
    """Groups of similar length, so that little is spent on padding."""
    ordered = sorted(texts, key=len)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
