"""Removes secrets from whatever a server or a file says, before it is logged, stored or passed on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable

# Whatever the environment calls a key, and what looks like one of the usual providers. Shorter values are placeholders
# such as "EMPTY", whose removal would only damage the text.
_SECRET_NAMES = re.compile(r"(API_KEY|SERVE_KEY|TOKEN|SECRET|PASSWORD)$")
_SECRET_LOOKS = re.compile(r"\b(?:sk-[\w-]{16,}|AIza[\w-]{30,}|hf_\w{20,}|Bearer\s+[\w.~+/-]{16,})")
_SECRET_MARKS = ("sk-", "AIza", "hf_", "Bearer")
_SHORTEST_SECRET = 8
_LONGEST_NAME = 200

# At DEBUG these packages log headers and bodies of requests, with the key and every recording; at INFO a line a call.
_TALKATIVE = ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp")


def redacted(text: str) -> str:
    """Remove every key of this process's environment, what looks like a key, and what no file can hold."""
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """Make `redacted` for the environment as it is now: reading the environment takes longer than all else."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name.upper()) and len(value) >= _SHORTEST_SECRET
    }
    secrets = sorted(found, key=len, reverse=True)

    def clean(text: str) -> str:
        text = text.encode("utf-8", "backslashreplace").decode()
        for secret in secrets:
            text = text.replace(secret, "***")
        # Most texts hold nothing of the kind, and looking for its marks takes a tenth of the time.
        return _SECRET_LOOKS.sub("***", text) if any(mark in text for mark in _SECRET_MARKS) else text

    return clean


def short(name: object, clean: Callable[[str], str] = redacted) -> str:
    """Give what is kept of a name or number that a server sent."""
    if isinstance(name, str):
        return clean(name)[:_LONGEST_NAME]
    return str(name) if type(name) is int and abs(name) < 10**18 else ""


def keep_requests_out_of_logs() -> None:
    """Let the packages that carry requests log nothing below a warning, whatever the level of the root logger."""
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        if logger.level < logging.WARNING:
            logger.setLevel(logging.WARNING)
