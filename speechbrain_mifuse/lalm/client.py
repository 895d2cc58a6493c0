"""Asking an OpenAI-compatible chat-completions API about one recording."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
import urllib.parse

import openai

from speechbrain_mifuse.errors import UserError
from speechbrain_mifuse.lalm.answer import Answer, Reply, Response
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import clean_base_url

DEFAULT_BASE_URL = "https://api.openai.com/v1"

# Some servers report a blocked question as an error and not as a choice.
_BLOCKED = {"content_filter", "content_policy_violation"}


class LalmError(UserError):
    """The API did not answer.

    Attributes
    ----------
    hopeless : bool
        Whether every other request would fail the same way (wrong key, wrong model, no credit).
    """

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


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
    timeout : float
        Seconds for one attempt.
    max_retries : int
        Further attempts after a time-out, a lost connection or status 408, 409, 429 or 5xx, with exponential
        back-off or as long as the server says (``Retry-After``).
    deadline : float
        Seconds for one `ask` with all its attempts.

    Raises
    ------
    UserError
        If `base_url` is no address or carries credentials.

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
    ):
        self.base_url = clean_base_url(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL)
        self.model = model
        self.timeout = timeout
        self.max_retries = max_retries
        self.deadline = deadline
        self._api: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> LalmClient:
        self._connection()
        return self

    async def __aexit__(self, *_):
        await self.aclose()

    async def aclose(self):
        """Close open connections; the client can be used again afterwards."""
        api, self._api = self._api, None
        if api is not None:
            await api.close()

    async def ask(
        self, prompt: Prompt, wav: bytes, n: int = 1, temperature: float = 1.0, seed: int | None = None, **sampling
    ) -> list[Response]:
        """Ask for `n` answers about one recording.

        Many servers return fewer choices than asked for, so they are counted and the rest is asked for again, with the
        seed moved on by the number of choices received.

        Parameters
        ----------
        prompt : Prompt
            The question.
        wav : bytes
            A WAV file.
        n : int
            Number of answers.
        temperature : float
            Sampling temperature; 0 asks for the most likely answer.
        seed : int, optional
            Best effort on most servers.
        **sampling
            Further fields of the API, e.g. `top_p`.

        Returns
        -------
        list of Response
            Exactly `n`; refused and unusable replies are among them, marked by their kind.

        Raises
        ------
        LalmError
            If the server is down, rejects the request, does not know the model, or does not answer before the deadline.
        """
        messages = prompt.messages(base64.b64encode(wav).decode())
        fields = {"temperature": temperature, **sampling, **prompt.request_options()}
        try:
            return await asyncio.wait_for(self._ask(prompt, messages, n, seed, fields), self.deadline)
        except asyncio.TimeoutError:
            raise LalmError(f"{self._name()}: no answer within {self.deadline:g} s") from None

    async def check(self):
        """Find out before any audio is sent whether a server is there and accepts the key.

        Raises
        ------
        LalmError
            If nothing listens at the address or the key is refused. A server without a list of models passes.
        """
        try:
            await self._connection().with_options(max_retries=0, timeout=min(self.timeout, 10.0)).models.list()
        except (openai.APITimeoutError, json.JSONDecodeError):
            return
        except (openai.APIConnectionError, openai.AuthenticationError) as error:
            raise await self._explain(error) from None
        except openai.OpenAIError:
            return

    async def _ask(self, prompt: Prompt, messages: list, n: int, seed: int | None, fields: dict) -> list[Response]:
        responses: list[Response] = []
        while len(responses) < n:
            next_seed = None if seed is None else seed + len(responses)
            responses += await self._request(prompt, messages, n - len(responses), next_seed, fields)
        return responses

    async def _request(self, prompt: Prompt, messages: list, n: int, seed: int | None, fields: dict) -> list[Response]:
        optional = {} if seed is None else {"seed": seed}
        try:
            completion = await self._connection().chat.completions.create(
                model=self.model, messages=messages, n=n, **optional, **fields
            )
        except openai.BadRequestError as error:
            if error.code in _BLOCKED:
                return [self._blocked(error, seed)]
            raise await self._explain(error) from None
        except openai.OpenAIError as error:
            raise await self._explain(error) from None
        except json.JSONDecodeError:  # a body that announces JSON and is none
            raise LalmError(f"{self._name()}: answered with something that is not JSON") from None
        return self._responses(prompt, completion, n, seed)

    def _responses(self, prompt: Prompt, completion, n: int, seed: int | None) -> list[Response]:
        choices = list(getattr(completion, "choices", None) or [])[:n]
        if not choices:
            raise LalmError(
                f"{self._name()}: answered without any choice. Check that --lalm_base_url is an OpenAI-compatible API "
                "(most end in /v1)"
            )
        usage = getattr(completion, "usage", None)
        responses = []
        for position, choice in enumerate(choices):
            # Whatever is kept of a reply is read from its redacted form.
            reply = Reply.from_json(self._redacted(reply_of(choice).to_json()))
            response = Response(
                answer=prompt.parse(reply),
                raw=reply.to_json(),
                seed=None if seed is None else seed + position,
                usage=usage.model_dump(exclude_none=True) if usage and position == 0 else None,
                served_model=self._redacted(completion.model or ""),
                system_fingerprint=self._redacted(completion.system_fingerprint or ""),
            )
            responses.append(response)
        return responses

    def _blocked(self, error: openai.APIError, seed: int | None) -> Response:
        raw = Reply("", "content_filter", self._redacted(error.message)).to_json()
        return Response(Answer("refusal", reason="the server's content filter rejected the request"), raw, seed)

    def _connection(self) -> openai.AsyncOpenAI:
        """Return the API client of the running event loop: pooled connections cannot move to another one."""
        loop = asyncio.get_running_loop()
        if self._api is None or self._loop is not loop:
            self._loop = loop
            # A proxy from the environment has no business between two programs on one machine.
            direct = openai.DefaultAsyncHttpxClient(trust_env=False) if is_loopback(self.base_url) else None
            self._api = openai.AsyncOpenAI(
                api_key=self._key(),
                base_url=self.base_url,
                timeout=self.timeout,
                max_retries=self.max_retries,
                http_client=direct,
            )
        return self._api

    def _key(self) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not is_loopback(self.base_url):
            raise LalmError(f"{self._name()}: set the environment variable OPENAI_API_KEY", hopeless=True)
        return key or "none-needed"

    def _name(self) -> str:
        return f"--lalm_base_url {self.base_url} (model {self.model!r})"

    def _redacted(self, text: str) -> str:
        """Without the key, which a careless server may echo."""
        key = os.environ.get("OPENAI_API_KEY")
        return text.replace(key, "***") if key else text

    async def _explain(self, error: Exception) -> LalmError:
        """Say in one sentence what failed and what to do about it."""
        status = getattr(error, "status_code", None)
        remedy, hopeless = _REMEDIES.get(status, ("", False))
        if isinstance(error, openai.APIConnectionError):
            remedy, hopeless = "is the server running and the address right?", False
        if isinstance(error, openai.APITimeoutError):
            remedy, hopeless = f"no answer within {self.timeout:g} s; retry later or raise the time-out", False
        if getattr(error, "code", None) == "insufficient_quota":
            remedy, hopeless = "the account has no credit left", True
        if status == 404:
            remedy += await self._models()
        said = self._redacted(" ".join(str(getattr(error, "message", error)).split()))[:300]
        return LalmError(f"{self._name()}: {said} -> {remedy or 'see the message of the server'}", hopeless)

    async def _models(self) -> str:
        try:
            page = await self._connection().with_options(max_retries=0, timeout=10.0).models.list()
            names = [model.id for model in page.data]
        except (openai.OpenAIError, json.JSONDecodeError, AttributeError, TypeError):
            return ""
        return f"; it offers {', '.join(names[:20])}" if names else ""


_REMEDIES = {
    401: ("set the environment variable OPENAI_API_KEY to a key of this server", True),
    403: ("this key may not use the model", True),
    404: ("check --lalm_model and --lalm_base_url", True),
    413: ("the recording is too long for this server", False),
    429: ("the server limits the rate: run again later, finished answers are kept", False),
}


def reply_of(choice) -> Reply:
    """Translate a choice of the openai package, tolerating fields that lesser servers leave out.

    Parameters
    ----------
    choice : openai.types.chat.chat_completion.Choice
        One choice of a chat completion.

    Returns
    -------
    Reply

    Example
    -------
    >>> from types import SimpleNamespace as Namespace
    >>> reply_of(Namespace(message=Namespace(content="angry"), finish_reason="stop"))
    Reply(text='angry', finish_reason='stop', refusal=None, top_logprobs=None)
    """
    message = getattr(choice, "message", None)
    return Reply(
        text=_text(getattr(message, "content", None)),
        finish_reason=getattr(choice, "finish_reason", None),
        refusal=getattr(message, "refusal", None),
        top_logprobs=_first_token(getattr(choice, "logprobs", None)),
    )


def is_loopback(base_url: str) -> bool:
    """Whether an address names this machine.

    Parameters
    ----------
    base_url : str
        An http(s) address.

    Returns
    -------
    bool

    Example
    -------
    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("https://api.openai.com/v1")
    (True, False)
    """
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(content) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part.get("text") or "" for part in parts if isinstance(part, dict))


def _first_token(logprobs) -> tuple[tuple[str, float], ...] | None:
    """Alternatives for the first token that is not blank or a quotation mark."""
    for position in getattr(logprobs, "content", None) or ():
        if position.token.strip(" \t\r\n\"'`*Ġ▁"):
            return tuple((item.token, float(item.logprob)) for item in position.top_logprobs or ()) or None
    return None
