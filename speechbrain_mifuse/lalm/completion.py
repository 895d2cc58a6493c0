"""Reading what a chat-completions API sent, whatever it is: a completion, a choice of it, an error in any dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from speechbrain_mifuse.lalm.answer import Answer, Reply, Response
from speechbrain_mifuse.lalm.limits import known_usage
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.redaction import redacted, redactor, short

# Some servers report a blocked question as an error and not as a choice.
BLOCKED = {"content_filter", "content_policy_violation"}

# Characters of a text of a reply that are kept.
_LONGEST_TEXT = 2**18
# Alternatives for a token; servers give at most 20.
_MOST_TOKENS = 100
# What decoding a reply may raise: no JSON, too deep, a number of too many digits, fields of other types.
UNREADABLE = (ValueError, TypeError, AttributeError, RecursionError)

# Where the body of an error holds its message, in any provider's dialect.
_MESSAGE_KEYS = ("error", "message", "detail", "msg", "errors", "error_description", "error_msg", "reason", "title")
LONGEST_MESSAGE = 300

# HTTP status that is meant by the code, status or type of an error which comes with status 200; the first that fits.
_MEANT = (
    (re.compile(r"auth|api.?key|credential"), 401),
    (re.compile(r"permission|forbidden|access"), 403),
    (re.compile(r"not.?found|no.?such|unknown.?model"), 404),
    (re.compile(r"rate.?limit|quota|exhausted|throttl|too.?many"), 429),
    (re.compile(r"invalid|bad.?request|argument|unsupported|filter|policy|length|exceed"), 400),
    (re.compile(r"overload|unavailable|internal|server|busy|time.?out|capacity"), 503),
)


class Unusable(Exception):
    """A reply with status 200 that is no completion: cut off, no JSON, without a choice, or an error all the same."""

    def __init__(self, message: str, status: int | None = None, code: object = None):
        super().__init__(message)
        self.message, self.status_code, self.code = message, status, code


def completion_of(text: str) -> dict:
    """Decode the body of a reply with status 200; `Unusable` says what it is if no completion."""
    streamed = re.match(r"\s*(?:(?:event|id|retry)?:[^\n]*\n\s*)*data:([^\n]*)", text)
    try:
        body = json.loads(streamed[1] if streamed else text)
    except (ValueError, RecursionError):
        body = None
    error = body[0] if isinstance(body, list) and body else body
    if isinstance(error, dict) and not items(error.get("choices")):
        inner = error["error"] if isinstance(error.get("error"), dict) else error
        status = _meant_status(inner)
        if status is not None or error.get("error"):
            raise Unusable(f"HTTP 200 with an error: {message_in(error)}", status, inner.get("code"))
    if streamed:
        raise Unusable("answered with a stream of events, which was not asked for: set sampling: {stream: false}")
    if body is None and text.strip() != "null":
        raise Unusable(f"answered with something that is not JSON: {beginning(text) or 'nothing'}")
    if not isinstance(body, dict) or not items(body.get("choices")):
        raise Unusable(f"answered without any choice: {beginning(text)}")
    return body


def _meant_status(error: Mapping) -> int | None:
    """HTTP status that an error in a body stands for; `None` if it names none."""
    names = [error.get(key) for key in ("code", "status", "status_code", "type")]
    numbers = [int(name) for name in map(str, names) if re.fullmatch(r"[45]\d\d", name)]
    text = " ".join(name for name in names if isinstance(name, str)).casefold()
    return next(iter(numbers), None) or next((status for known, status in _MEANT if known.search(text)), None)


def responses(prompt: Prompt, completion: Mapping, n: int = 1, seed: int | None = None) -> list[Response]:
    """Read up to `n` choices of a completion; the first one has its tokens."""
    # Only known fields of known types are kept, without secrets that the server may have echoed.
    usage, clean = known_usage(completion.get("usage")), redactor()
    model, fingerprint = (short(completion.get(name), clean) for name in ("model", "system_fingerprint"))
    replies = [reply_of(choice, clean) for choice in items(completion.get("choices"))[:n]]
    seeds = (None if seed is None else seed + i for i in range(n))
    usages = (usage if i == 0 else None for i in range(n))
    return [
        Response(prompt.parse(reply), reply.to_json(), seed, usage, model, fingerprint)
        for reply, seed, usage in zip(replies, seeds, usages, strict=False)
    ]


def blocked(message: str, seed: int | None = None) -> Response:
    """Make the refusal that stands for a request which the server's content filter rejected with an error."""
    raw = Reply("", "content_filter", redacted(message)).to_json()
    return Response(Answer("refusal", reason="the server's content filter rejected the request"), raw, seed)


def error_in(body: object) -> tuple[str, str]:
    """Give code and message of the body of an error."""
    inner = body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict) else body
    return short(field(inner, "code")), redacted(" ".join(message_in(body).split()))[:LONGEST_MESSAGE]


def message_in(body: object, depth: int = 5) -> str:
    """Find the message in the body of an error; the beginning of the body if there is none."""
    if isinstance(body, str):
        return beginning(body)
    if isinstance(body, list) and body and depth:
        return "; ".join(message_in(item, depth - 1) for item in body[:3])
    found = next((body[key] for key in _MESSAGE_KEYS if body.get(key)), None) if isinstance(body, dict) else None
    if found is None or not depth:
        return beginning(_as_json(body))
    place = ".".join(map(short, items(body.get("loc"))))
    return f"{place}: {message_in(found, depth - 1)}" if place else message_in(found, depth - 1)


def beginning(text: str) -> str:
    """Give the first words of a body in one line, of a page without its tags."""
    whole = text.lstrip()
    text = whole[: 10 * LONGEST_MESSAGE]
    if len(text) < len(whole):  # half a key would not be known as one
        text = re.sub(r"\S{0,300}\Z", "", text)
    if text.startswith("<"):
        text = re.sub(r"<(style|script)\b[^>]*>[^<]*</\1>|<[^>]*>", " ", text)
    return " ".join(text.split())


def reply_of(choice, clean: Callable[[str], str] | None = None) -> Reply:
    """Translate a choice of a chat completion, tolerating fields that lesser servers leave out or fill otherwise."""
    clean = clean or redactor()
    message = field(choice, "message")
    ended, refusal = field(choice, "finish_reason"), field(message, "refusal")
    # An answer may come as the arguments of a function call; beside content, both must agree.
    text = "\n".join(part for part in (_text(field(message, "content")), *_arguments(message)) if part.strip())
    return Reply(
        text=_kept(text, clean),
        finish_reason=None if ended is None else short(ended, clean),
        refusal=_kept(refusal if isinstance(refusal, str) else "refused", clean) if refusal else None,
        top_logprobs=_first_token(field(choice, "logprobs"), clean),
        reasoning=None if text else _reasoning(message, clean),
    )


def _kept(text: str, clean: Callable[[str], str]) -> str:
    return clean(text)[:_LONGEST_TEXT]


def _arguments(message) -> list[str]:
    calls = [field(call, "function") for call in items(field(message, "tool_calls"))]
    calls.append(field(message, "function_call"))
    found = [field(call, "arguments") for call in calls]
    return [item if isinstance(item, str) else _as_json(item) for item in found if isinstance(item, (str, dict))]


def _as_json(value: object) -> str:
    """JSON of what was decoded; nothing of what is nested beyond reason."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        return ""


def _reasoning(message, clean) -> str | None:
    found = (field(message, name) for name in ("reasoning_content", "reasoning", "thinking"))
    return next((_kept(text, clean) for text in found if isinstance(text, str) and text.strip()), None)


def field(thing, name: str):
    """Give a field of an object; `None` of anything else."""
    return thing.get(name) if isinstance(thing, Mapping) else None


def items(value) -> Sequence:
    """Give a list's items; none of anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def _text(content) -> str:
    if isinstance(content, str):
        return content
    parts = [part for part in items(content) if isinstance(part, dict)]
    texts = [part.get("text") for part in parts if part.get("type") not in ("thinking", "reasoning")]
    return "".join(text for text in texts if isinstance(text, str))


def _first_token(logprobs, clean) -> tuple[tuple[str, float], ...] | None:
    """Alternatives for the first token that is not blank or a quotation mark."""
    for position in items(field(logprobs, "content")):
        if short(field(position, "token"), clean).strip(" \t\r\n\"'`*Ġ▁"):
            pairs = [(field(item, "token"), field(item, "logprob")) for item in items(field(position, "top_logprobs"))]
            # An alternative without a number says nothing: it must not count as certain.
            known = [(token, p) for token, p in pairs if isinstance(token, str) and type(p) in (int, float)]
            return tuple((short(token, clean), float(p)) for token, p in known[:_MOST_TOKENS] if abs(p) < 1e300) or None
    return None
