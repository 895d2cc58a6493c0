"""What holds a collection back: the provider's limits, its request to wait, and the money.

Written by hand: libraries for retries and rate limits know neither what a call can cost nor what a reply did cost.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import Callable, Iterable, Mapping

from speechbrain_mifuse.lalm.profile import Price, Profile, Tokens, is_number
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.utils.errors import UserError

# Seconds that a server may ask to wait; a longer pause is a matter for people.
LONGEST_PAUSE = 600.0

# Beside what is asked, a chat template holds some tokens of its own.
TEMPLATE_TOKENS = 64

# Tokens of an answer by its shape, for plans: of each label in an object of probabilities, or of one word.
EXPECTED_OUTPUT = {"object": lambda classes: 10 * classes, "word": lambda classes: 4, "first_token": lambda classes: 4}


class LalmError(UserError):
    """The API did not answer; `hopeless` if every other request would fail the same way (wrong key, no credit)."""

    def __init__(self, message: str, hopeless: bool = False, status: int | None = None, said: str = ""):
        super().__init__(message)
        self.hopeless, self.status, self.said = hopeless, status, said


class BudgetReached(LalmError):
    """The next call could pass the budget; nothing is wrong with the API."""


class Signal:
    """Wakes whoever waits; bound to no event loop until someone does."""

    def __init__(self):
        self._waiting: list[asyncio.Future] = []

    async def wait(self):
        """Wait for the next `fire`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def fire(self):
        """Wake all who wait now."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class Pace:
    """Lets calls start no faster than the provider allows, and none at all while it asked to wait."""

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self.per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self.per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._paused_until = -math.inf

    async def admit(self, tokens: float):
        """Wait until a call may start."""
        while True:
            now = time.monotonic()
            start = max(now, self._next_request, self._next_token, self._paused_until)
            self._next_request = start + self.per_request
            self._next_token = start + tokens * self.per_token
            if start > now:
                await asyncio.sleep(start - now)
            # A pause that came meanwhile holds for this call too; it queues again, or all would start at its end.
            if self._paused_until <= time.monotonic():
                return

    def settle(self, estimated: float, used: float):
        """Correct the count of tokens after a call."""
        # A server that counts a billion tokens must not stop the run for years.
        self._next_token += min((used - estimated) * self.per_token, LONGEST_PAUSE)

    def pause(self, seconds: float):
        """Let no call start for a while, whoever makes it."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)


class Budget:
    """Money that may be spent, counted so that calls in flight cannot pass it together.

    The most that a call can cost is set aside before it starts and settled by the usage in its reply. A call that does
    not fit waits while others are in flight, because they mostly cost less than was set aside. The first call goes
    alone: it shows how the provider counts tokens, and what is set aside is scaled if the estimate was too low. A call
    whose outcome is unknown (a lost connection) counts with all that was set aside.

    Parameters
    ----------
    limit : float, optional
        Most that may be spent, in the currency of the price; no limit by default.
    price : Price, optional
        What tokens cost; needed for a limit.
    spent : float
        What was spent before, see `lalm.plan.spent_before`.

    Raises
    ------
    UserError
        If the limit is no positive amount, or there is no price for it.

    Example
    -------
    >>> budget = Budget(2.0, Price(1.0, 1.0, 10.0))
    >>> aside = asyncio.run(budget.reserve(Tokens(text=100_000, output=50_000)))
    >>> budget.settle(aside, used=Tokens(text=100_000, output=20_000))
    >>> round(aside, 6), round(budget.spent, 6)
    (0.6, 0.3)
    """

    def __init__(self, limit: float | None = None, price: Price | None = None, spent: float = 0.0):
        if limit not in (None, math.inf) and not (is_number(limit) and limit > 0):
            raise UserError(f"--lalm_budget must be a positive amount of money, not {limit!r}")
        if limit is not None and price is None:
            raise UserError(
                "--lalm_budget needs prices: add `price` to the lalm_profile (see hparams/lalm/openai.yaml)"
            )
        self.limit, self.price, self.spent = limit, price, spent
        self.in_flight, self.margin = 0.0, 1.0
        self._calls, self._counted = 0, False
        self._changed = Signal()

    async def reserve(self, most: Tokens) -> float:
        """Set aside what a call can cost, waiting for other calls if it does not fit."""
        while not self._fits(amount := self._cost(most) * self.margin):
            if not self._calls:
                raise BudgetReached(
                    f"the budget of {self.limit:g} {self.price.currency} would be passed: {self.spent:.4g} are spent "
                    f"and the next call can cost {amount:.3g}. Raise --lalm_budget to go on",
                    hopeless=True,
                )
            await self._changed.wait()
        self._calls += 1
        self.in_flight += amount
        return amount

    def settle(self, amount: float, used: Tokens | None):
        """Replace what was set aside by what was used; `None` if nobody knows, then all of it counts as spent."""
        cost = amount if used is None else self._cost(used)
        self._calls -= 1
        self.in_flight = self.in_flight - amount if self._calls else 0.0
        self.spent += cost
        if used is not None and used.total:
            self._counted = True
            if cost > amount:
                self.margin *= 1.1 * cost / amount if amount else 1.0
        self._changed.fire()

    def told(self) -> str:
        """Tell people what was spent; empty without a price."""
        if self.price is None:
            return ""
        limit = f"/{self.limit:g}" if self.limit is not None else ""
        return f"{self.spent:.4g}{limit} {self.price.currency}"

    def _cost(self, tokens: Tokens) -> float:
        return self.price.cost(tokens) if self.price else 0.0

    def _fits(self, amount: float) -> bool:
        if self.limit is None:
            return True
        alone = self._counted or not self._calls
        return alone and self.spent + self.in_flight + amount <= self.limit


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait, by `Retry-After` (seconds or a date) or `retry-after-ms`."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < math.inf else None
    try:
        return max(email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def estimated_tokens(
    prompt: Prompt, seconds: float, n: int, profile: Profile, sampling: Mapping
) -> tuple[Tokens, Tokens]:
    """Estimate what a call takes, for plans and limits, and an upper bound, for budgets."""
    text, heard = prompt.text(), min(seconds, profile.longest_audio or seconds)
    audio = math.ceil(heard * profile.audio_tokens_per_second)
    output, longest = n * EXPECTED_OUTPUT[prompt.form.shape](len(prompt.labels)), profile.output_limit(sampling)
    expected = Tokens(math.ceil(len(text) / 4) + TEMPLATE_TOKENS // 4, audio, output)
    # No token of text is shorter than a byte.
    most = (len(text.encode()) + TEMPLATE_TOKENS, audio + TEMPLATE_TOKENS)
    return expected, Tokens(*most, output if longest is None else n * longest)


# Fields of a reply's usage that are kept, and of what they hold.
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_DETAILS = {
    "prompt_tokens_details": ("audio_tokens", "text_tokens", "cached_tokens"),
    "completion_tokens_details": ("reasoning_tokens", "audio_tokens", "text_tokens"),
}
_MOST_TOKENS = 10**12


def known_usage(usage: object) -> dict | None:
    """Keep of a reply's usage the counts that are known, and nothing else that a server may have put there."""
    kept = _counts(usage, _COUNTS)
    details = {name: _counts(usage.get(name), names) for name, names in _DETAILS.items()} if kept else {}
    return {**kept, **{name: counts for name, counts in details.items() if counts}} or None


def _counts(usage: object, names: Iterable[str]) -> dict[str, int]:
    found = {name: usage.get(name) for name in names} if isinstance(usage, Mapping) else {}
    return {name: value for name, value in found.items() if type(value) is int and 0 <= value <= _MOST_TOKENS}


def used_tokens(usage: Mapping | None) -> Tokens | None:
    """Read the usage that a reply reports."""
    usage = known_usage(usage)
    if usage is None:
        return None
    prompt, completion, total = (usage.get(name, 0) for name in _COUNTS)
    audio = min(usage.get("prompt_tokens_details", {}).get("audio_tokens", prompt), prompt)
    return Tokens(prompt - audio, audio, max(completion, total - prompt))
