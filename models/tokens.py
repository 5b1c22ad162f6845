"""How many tokens a prompt has, estimated from above, so that no server has to cut it."""

from __future__ import annotations

import re

from models.inference import Prompt

MESSAGE_TOKENS = 12
"""Room for the marks a chat template puts around one message."""
TEMPLATE_TOKENS = 48
"""Room for the system message some templates add by themselves."""

_WORD = re.compile(r"(?<![0-9A-Za-z])([A-Za-z]+)(?![0-9A-Za-z])")


def prompt_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt, estimated from above."""
    texts = sum(tokens_from_above(message.content) + MESSAGE_TOKENS for message in prompt.messages)
    return texts + TEMPLATE_TOKENS


def tokens_from_above(text: str) -> int:
    """More tokens than the usual vocabularies make of a text.

    Two letters per token in a Latin word, one byte per token in everything else, which includes letters
    among digits, as in a hash. The server has the last word: it refuses what is too long and never cuts.
    """
    parts = _WORD.split(text)
    words, gaps = parts[1::2], parts[::2]
    # A single space joins the word after it in every vocabulary we meet.
    rest = len("".join(gaps).encode("utf-8", "surrogatepass")) - gaps.count(" ")
    return sum((len(word) + 1) // 2 for word in words) + rest
