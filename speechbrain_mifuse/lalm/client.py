"""Asking an OpenAI-compatible chat-completions API about one recording.

Attempts are repeated by hand: the retries of the openai package know neither the limits nor the budget.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.cookiejar
import json
import logging
import os
import random
import secrets
import time
from collections.abc import Mapping, Sequence

import aiohttp
import openai
from aiohttp.http_exceptions import HttpProcessingError

from speechbrain_mifuse.lalm.answer import Response
from speechbrain_mifuse.lalm.completion import (
    BLOCKED,
    LONGEST_MESSAGE,
    UNREADABLE,
    Unusable,
    beginning,
    blocked,
    completion_of,
    field,
    items,
    message_in,
    responses,
)
from speechbrain_mifuse.lalm.limits import (
    LONGEST_PAUSE,
    Budget,
    LalmError,
    Pace,
    estimated_tokens,
    retry_after,
    used_tokens,
)
from speechbrain_mifuse.lalm.profile import NO_TOKENS, Profile, Tokens
from speechbrain_mifuse.lalm.prompt import Clip, Prompt
from speechbrain_mifuse.lalm.redaction import keep_requests_out_of_logs, redacted, short
from speechbrain_mifuse.lalm.store import clean_base_url, is_loopback
from speechbrain_mifuse.utils.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_BASE_URL = "https://api.openai.com/v1"

# Faults that pass: time-out, conflict, rate limit; and everything from 500 on.
_PASSING = {408, 409, 429}
# Statuses with which a server asks all to wait, where it says how long.
_BUSY = {429, 503}
# Failures before anything was sent; all others may have been paid for.
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
# Idle connections that are looked at for one to which nothing came unasked.
_STRAY_CONNECTIONS = 16
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 8.0

# Bytes of a reply, after decompression: log-probabilities of a long answer take a few hundred kilobytes.
_MOST_BYTES = 8 * 2**20
_MOST_HEADERS = 250
# What is known to grow by a bounded factor when it is unpacked piece by piece.
_ENCODINGS = {"", "identity", "gzip", "deflate"}
# Headers that say how a body was sent.
_OF_THE_TRANSFER = {"content-encoding", "content-length", "content-type", "transfer-encoding"}
# Seconds for finding out whether a server is there, and which models it has.
_QUICKLY = 10.0
# Stands in the place of the audio while the rest of a body is made ready; no prompt can hold it by chance.
_AUDIO = secrets.token_hex(16)


class _TooSlow(Unusable):
    """A reply that had not come whole when the time-out was over."""


class _Connector(aiohttp.TCPConnector):
    """Reuses no connection on which bytes came unasked: they would be taken for the answer to the next request."""

    async def connect(self, *request, **options):
        """Give a connection on which nothing has been received since its last reply."""
        for _ in range(2):  # the event loop reads what has arrived on idle connections, then hands it over
            await asyncio.sleep(0)
        for _ in range(_STRAY_CONNECTIONS):
            connection = await super().connect(*request, **options)
            if not connection.protocol.should_close:
                return connection
            connection.close()
        raise aiohttp.ClientConnectionError("the server sends replies to requests that it did not get")


def _guarded(transport):
    """Make a transport of aiohttp use our connector, and keep no cookies: they would grow with each reply."""
    ssl, limit = transport.ssl_context, transport.limits.max_connections
    transport.client = lambda: aiohttp.ClientSession(
        connector=_Connector(ssl=ssl, limit=limit, keepalive_timeout=transport.limits.keepalive_expiry),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    return transport


class _BoundedHttpClient(openai.DefaultAioHttpClient):
    """An HTTP client that reads all of a reply: so many bytes after decompression, within the time-out as a whole."""

    most_bytes = _MOST_BYTES

    def _init_transport(self, *args, **options):
        return _guarded(super()._init_transport(*args, **options))

    def _init_proxy_transport(self, *args, **options):
        return _guarded(super()._init_proxy_transport(*args, **options))

    async def send(self, request, **options):
        """Send a request; the whole reply is read before it is given back."""
        seconds = request.extensions.get("timeout", {}).get("read")
        try:
            return await asyncio.wait_for(self._whole(request, {**options, "stream": True}), seconds)
        except asyncio.TimeoutError:
            raise _TooSlow(f"no answer within {seconds:g} s") from None
        # The packages in between translate what they know of; a connection that cannot be made is among it.
        except (aiohttp.ClientResponseError, HttpProcessingError, *UNREADABLE) as error:
            said = beginning(str(getattr(error, "message", error)))
            raise Unusable(f"answered with something that is not HTTP: {said}") from None

    async def _whole(self, request, options: Mapping):
        reply = await super().send(request, **options)
        content = bytearray()
        try:
            if len(reply.headers.raw) > _MOST_HEADERS:
                raise Unusable(f"answered with more than {_MOST_HEADERS} headers")
            if reply.headers.get("content-encoding", "").strip().lower() not in _ENCODINGS:
                raise Unusable("answered in a compression that was not asked for")
            async for part in reply.aiter_bytes():
                content += part
                if len(content) > self.most_bytes:
                    raise Unusable(f"answered with more than {self.most_bytes // 2**20} MB")
        finally:
            await reply.aclose()
        headers = [pair for pair in reply.headers.multi_items() if pair[0].lower() not in _OF_THE_TRANSFER]
        # JSON is UTF-8; of the other codecs that a header can name, some fail and some take minutes.
        headers.append(("content-type", reply.headers.get("content-type", "").partition(";")[0]))
        return type(reply)(reply.status_code, headers=headers, content=bytes(content), request=request)


# What a server can make the openai package raise.
FAULTS = (openai.OpenAIError, Unusable, *UNREADABLE)


@dataclasses.dataclass
class _Call:
    """One request with what it may take; `used` is the time in seconds that counts against its deadline."""

    body: bytes
    expected: Tokens = NO_TOKENS
    most: Tokens = NO_TOKENS
    used: float = 0.0


class LalmClient:
    """A black-box audio language model: audio in, stochastic predictions out.

    The key comes from the environment variable ``OPENAI_API_KEY`` only; a server on this machine needs none. It is sent
    to the server and appears nowhere else.

    Parameters
    ----------
    base_url : str, optional
        Address of the API; by default ``OPENAI_BASE_URL``, else OpenAI's.
    model : str
        Model name.
    timeout, deadline : float
        Seconds for one attempt, and for one request with all its attempts; waiting for limits, for the budget, or
        because the server asked for it, does not count.
    max_retries : int
        Further attempts after a time-out, a lost connection, a reply that is no completion, or status 408, 409, 429 or
        5xx, with exponential back-off. Where the server says how long to wait (``Retry-After``) after 429 or 503, all
        calls of this client wait.
    profile, budget : Profile, Budget, optional
        What the provider understands and allows, and the money that may be spent.

    Example
    -------
    >>> client = LalmClient("http://127.0.0.1:8000/v1/", "mifuse")
    >>> client.base_url, client.model
    ('http://127.0.0.1:8000/v1', 'mifuse')
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        timeout: float = 60.0,
        max_retries: int = 6,
        deadline: float = 300.0,
        profile: Profile | None = None,
        budget: Budget | None = None,
    ):
        self.base_url = clean_base_url(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL)
        self.model, self.timeout, self.max_retries, self.deadline = model, timeout, max_retries, deadline
        self.profile = profile or Profile()
        self.budget = budget or Budget()
        self.pace = Pace(self.profile.requests_per_minute, self.profile.tokens_per_minute)
        keep_requests_out_of_logs()
        self._api: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, profile: Profile, base_url: str | None = None, budget: Budget | None = None) -> LalmClient:
        """Make the client that a profile describes."""
        if not profile.model:
            raise UserError("--lalm_model: name the model to be asked")
        patience = (profile.timeout, int(profile.max_retries), profile.deadline)
        return cls(base_url or profile.base_url, profile.model, *patience, profile=profile, budget=budget)

    async def __aenter__(self) -> LalmClient:
        self._pool()
        return self

    async def __aexit__(self, *_):
        # The client can be used again afterwards.
        api, self._api = self._api, None
        if api is not None:
            await api.close()

    async def ask(
        self, prompt: Prompt, wav: bytes | Clip, n: int = 1, temperature=1.0, seed: int | None = None, **sampling
    ) -> list[Response]:
        """Ask for `n` answers about one recording.

        Many servers return fewer choices than asked for, so they are counted and the rest is asked for again, with the
        seed moved on by the number of choices received.

        Parameters
        ----------
        prompt, n : Prompt, int
            The question, and the number of answers.
        wav : bytes or Clip
            A WAV file; as a `Clip` it is encoded once for many calls.
        temperature, seed, **sampling
            Fields of the API; the seed is not sent where the profile says that it is not honored.

        Returns
        -------
        list of Response
            Exactly `n`; refused and unusable replies are among them, marked by their kind.

        Raises
        ------
        LalmError
            If the server does not answer or rejects the request, or the budget is used up (`BudgetReached`).
        """
        clip = wav if isinstance(wav, Clip) else Clip.of(wav)
        found: list[Response] = []
        while len(found) < n:
            next_seed = None if seed is None else seed + len(found)
            found += await self.ask_once(prompt, clip, n - len(found), temperature, next_seed, **sampling)
        return found

    async def ask_once(
        self, prompt: Prompt, clip: Clip, n: int = 1, temperature=1.0, seed: int | None = None, **sampling
    ) -> list[Response]:
        """Make one request for `n` answers; it may bring fewer."""
        n = n if self.profile.honours_n else 1
        body = self.body(prompt, _AUDIO, n, seed, temperature, **sampling)
        # Escaping the audio again for each call would cost more than all the rest.
        before, _, after = json.dumps(body).partition(_AUDIO)
        tokens = estimated_tokens(prompt, clip.seconds, n, self.profile, sampling)
        try:
            completion = await self._attempts(_Call(f"{before}{clip.data}{after}".encode(), *tokens))
        except (openai.OpenAIError, Unusable) as error:
            if getattr(error, "code", None) in BLOCKED:
                return [blocked(_message_of(error), seed)]
            raise await self.explain(error) from None
        return responses(prompt, completion, n, seed)

    async def complete(self, messages: Sequence[Mapping], **fields) -> dict:
        """Send any chat messages, within the limits but outside the budget, for instance to find out what works.

        Parameters
        ----------
        messages : sequence of mapping
            In the API's form.
        **fields
            Further fields of the request, such as `temperature`.

        Returns
        -------
        dict
            The chat completion, which has at least one choice.

        Raises
        ------
        LalmError
            If the server does not answer, rejects the request, or answers with something else.
        """
        body = json.dumps({"model": self.model, "messages": messages, **fields}).encode()
        try:
            return await self._attempts(_Call(body))
        except (openai.OpenAIError, Unusable) as error:
            raise await self.explain(error) from None

    async def check(self):
        """Find out before any audio is sent whether a server is there and accepts the key; `LalmError` if not."""
        api = self._pool().with_options(timeout=min(self.timeout, _QUICKLY))
        try:
            await _list_of_models(api)
        except (openai.APIConnectionError, openai.AuthenticationError) as error:
            if not _timed_out(error) and _unusable(error) is None:
                raise await self.explain(error) from None
        except openai.APIStatusError as error:
            if error.status_code in _MOVED:
                raise await self.explain(error) from None
        except FAULTS:
            return

    def body(
        self, prompt: Prompt, wav_base64: str, n: int = 1, seed: int | None = None, temperature=1.0, **sampling
    ) -> dict:
        """Body of the request for `n` answers, as `ask` sends it."""
        optional = {"n": n} if self.profile.honours_n else {}
        if seed is not None and self.profile.honours_seed:
            optional["seed"] = seed
        fields = {"temperature": temperature, **sampling, **prompt.request_options()}
        return {"model": self.model, **optional, **fields, "messages": prompt.messages(wav_base64)}

    async def _attempts(self, call: _Call) -> dict:
        """Send a request until it is answered, its faults do not pass, or attempts or time are used up."""
        for attempt in range(self.max_retries + 1):
            try:
                return await self._attempt(call)
            except (openai.OpenAIError, Unusable) as error:
                wait = self._wait(error, attempt)
                # A wait that the deadline cuts off would end in nothing but a less telling error.
                if attempt == self.max_retries or wait is None or call.used + wait > self.deadline:
                    raise
            call.used += wait
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt raises")

    async def _attempt(self, call: _Call) -> dict:
        aside = await self.budget.reserve(call.most)
        paid = None  # nobody knows, unless told otherwise
        sent = False
        try:
            await self.pace.admit(call.expected.total)
            sent, start = True, time.monotonic()
            try:
                completion = await asyncio.wait_for(self._post(call.body), self.deadline - call.used)
            finally:
                call.used += time.monotonic() - start
            paid = used_tokens(completion.get("usage")) or call.most
            self.pace.settle(call.expected.total, paid.total)
            return completion
        except asyncio.TimeoutError:
            raise LalmError(f"{self._name()}: no answer within {self.deadline:g} s") from None
        except (openai.OpenAIError, Unusable) as error:
            if getattr(error, "status_code", None) is not None or _never_sent(error):
                paid = NO_TOKENS
            raise
        finally:
            self.budget.settle(aside, paid if sent else NO_TOKENS)

    async def _post(self, body: bytes) -> dict:
        # The package's own method for this route copies and checks messages and reply, which takes twice as long as all
        # the rest of a call.
        options = {"headers": {"Content-Type": "application/json"}}
        text = await self._pool().post("/chat/completions", cast_to=str, content=body, options=options)
        return completion_of(text)

    def _wait(self, error: Exception, attempt: int) -> float | None:
        """Seconds before the next attempt; `None` if none would help. A busy server makes all calls wait."""
        backoff = min(_FIRST_BACKOFF * 2**attempt, _LONGEST_BACKOFF) * random.uniform(0.75, 1.0)
        status, response = getattr(error, "status_code", None), getattr(error, "response", None)
        if status is None:
            return backoff if isinstance(error, (openai.APIConnectionError, Unusable)) else None
        headers = {} if response is None else response.headers
        if status not in _PASSING and status < 500:
            return None
        if headers.get("x-should-retry") == "false" or error.code == "insufficient_quota":
            return None
        asked = retry_after(headers)
        if asked is None:
            return backoff
        if asked > LONGEST_PAUSE:
            return None
        if status in _BUSY:
            self.pace.pause(asked)
            return 0.0
        return asked

    def _pool(self) -> openai.AsyncOpenAI:
        """Return the API client of the running event loop: pooled connections cannot move to another loop."""
        loop = asyncio.get_running_loop()
        if self._api is None or self._loop is not loop:
            self._loop, self._api = loop, self.connection()
        return self._api

    def connection(self, most_bytes: int = _MOST_BYTES) -> openai.AsyncOpenAI:
        """Make an API client of the openai package with address, key and patience of this one."""
        # A proxy from the environment has no business between two programs on one machine; and reading the
        # certificates of all authorities takes a tenth of a second, for nothing where nothing is encrypted.
        here = is_loopback(self.base_url)
        if not here and self.base_url.startswith("http:"):
            logger.warning(
                "%s: plain http: whoever is on the way can read key and recordings. Use https.", self.base_url
            )
        checked = self.base_url.startswith("https:") or not here
        # aiohttp takes half of the processor time that httpx's own transport takes, with many calls at a time.
        no_cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        http_client = _BoundedHttpClient(trust_env=not here, verify=checked, follow_redirects=False, cookies=no_cookies)
        http_client.most_bytes = most_bytes
        return openai.AsyncOpenAI(
            api_key=self._key(),
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=0,
            http_client=http_client,
        )

    def _key(self) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not is_loopback(self.base_url):
            raise LalmError(f"{self._name()}: set the environment variable OPENAI_API_KEY", hopeless=True)
        return key or "none-needed"

    def _name(self) -> str:
        return f"--lalm_base_url {self.base_url} (model {self.model!r})"

    async def explain(self, error: Exception) -> LalmError:
        """Say in one sentence what failed and what to do about it."""
        status = getattr(error, "status_code", None)
        remedy, hopeless = _REMEDIES.get(status, ("", False))
        if isinstance(error, openai.APIConnectionError):
            remedy, hopeless = "is the server running and the address right?", False
        if status in _MOVED:
            remedy, hopeless = _moved_to(error), True
        if getattr(error, "code", None) == "insufficient_quota":
            remedy, hopeless = "the account has no credit left", True
        if status == 404:
            remedy += await self._models()
        if _timed_out(error):
            remedy, hopeless = f"no answer within {self.timeout:g} s; retry later or raise the time-out", False
        elif _unusable(error) is not None and status is None:
            remedy = "check that --lalm_base_url is an OpenAI-compatible API (most end in /v1)"
        said = redacted(" ".join(_message_of(error).split()))[:LONGEST_MESSAGE]
        message = f"{self._name()}: {said} -> {remedy or 'see the message of the server'}"
        return LalmError(message, hopeless, status, said)

    async def _models(self) -> str:
        api = self._pool().with_options(timeout=_QUICKLY)
        try:
            models = items(field(json.loads(await _list_of_models(api)), "data"))
        except FAULTS:
            return ""
        names = [name for model in models[:20] if (name := short(field(model, "id")))]
        return f"; it offers {', '.join(names)}" if names else ""


async def _list_of_models(api: openai.AsyncOpenAI) -> str:
    # The package's own method makes an object of each model, which takes minutes for a list of millions.
    return await api.get("/models", cast_to=str)


_REMEDIES = {
    401: ("set the environment variable OPENAI_API_KEY to a key of this server", True),
    403: ("this key may not use the model", True),
    404: ("check --lalm_model and --lalm_base_url", True),
    413: ("the recording is too long for this server", False),
    429: ("the server limits the rate: run again later, finished answers are kept", False),
}


# A redirect would carry the key and the recording to an address that nobody named.
_MOVED = {301, 302, 303, 307, 308}


def _moved_to(error: openai.APIStatusError) -> str:
    place = short(error.response.headers.get("location")) or "no address"
    return (
        f"it redirects to {place}, and neither key nor recordings go where --lalm_base_url does not name. If you trust "
        "that address, pass it"
    )


def _message_of(error: Exception) -> str:
    """Give what a server or the connection to it said."""
    status, body = getattr(error, "status_code", None), getattr(error, "body", None)
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {status}: {message_in(body) if body else 'no message'}"
    return str(_unusable(error) or _transport(error) or getattr(error, "message", error))


def _transport(error: Exception) -> BaseException | None:
    """Give what aiohttp raised: the classes in between take every lost connection for one that timed out."""
    return getattr(error.__cause__, "__cause__", None)


def _unusable(error: Exception) -> Unusable | None:
    """Give what the bounded client raised, which some versions of the openai package wrap."""
    return next((each for each in (error, error.__cause__) if isinstance(each, Unusable)), None)


def _never_sent(error: Exception) -> bool:
    return isinstance(_transport(error), _NEVER_SENT)


def _timed_out(error: Exception) -> bool:
    slow = isinstance(_unusable(error), _TooSlow) or isinstance(_transport(error), asyncio.TimeoutError)
    return slow and not _never_sent(error)
