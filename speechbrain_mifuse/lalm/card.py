"""What a server showed of itself when it was probed, and whether that is enough for a collection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS, Profile
from speechbrain_mifuse.utils.errors import UserError

YES, NO, UNKNOWN = "yes", "no", "cannot tell"
# Value of a finding where the server does not merely ignore a field but answers with an error.
REJECTED = "rejected"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One capability."""

    verdict: str
    evidence: str
    value: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """What a server showed of itself."""

    base_url: str
    model: str
    served_model: str = ""
    fingerprint: str = ""
    audio_part: str = "input_audio"
    constraint: str = "none"
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    findings: Mapping[str, Finding] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Finding:
        """Return a finding; "cannot tell" for one that the card lacks."""
        return self.findings.get(name, Finding(UNKNOWN, "not tried"))

    def good(self, names: Iterable[str]) -> list[str]:
        """Keep the findings that are "yes"."""
        return [name for name in names if self[name].verdict == YES]

    def text(self) -> str:
        """Show the card to people."""
        reported = " ".join(filter(None, (self.served_model, self.fingerprint)))
        head = f"{self.model} at {self.base_url}" + (f", reports itself as {reported}" if reported else "")
        spent = (
            f"{self.calls} calls, {self.prompt_tokens} prompt tokens, {self.completion_tokens} tokens of answers; "
            f"audio as {self.audio_part}"
        )
        wide = max(map(len, self.findings), default=0)
        far = max((len(finding.verdict) for finding in self.findings.values()), default=0)
        rows = [f"{name:{wide}}  {found.verdict:{far}}  {found.evidence}" for name, found in self.findings.items()]
        return "\n".join([head, spent, "", *rows])

    def to_json(self) -> str:
        """Serialise the card."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        fields["findings"] = {name: Finding(**finding) for name, finding in fields["findings"].items()}
        return cls(**fields)


def read_card(path: str | Path) -> Card:
    """Read a card that `speechbrain-mifuse probe --json` wrote."""
    try:
        return Card.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: no capability card: {error}. Write one by `speechbrain-mifuse probe --json {path}`."
        ) from None


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a collection needs of a server.

    Attributes
    ----------
    profile : Profile
        Its forms.
    samples : int
        Answers for each recording.
    temperature : float
        They are asked for with.
    longest : float, optional
        Seconds of the longest recording that is sent.
    varied : bool
        Whether the questions themselves differ from sample to sample.

    Example
    -------
    >>> Needs(Profile(), samples=5).temperature
    1.0
    """

    profile: Profile
    samples: int = 1
    temperature: float = 1.0
    longest: float | None = None
    varied: bool = False


class Rule(NamedTuple):
    """One need: which finding it asks for (`None` where a collection does not need it), and what to do without."""

    finding: Callable[[Card, Needs], str | None]
    remedy: Callable[[Card, Needs], str]


def check(card: Card, needs: Needs) -> list[str]:
    """Compare what a collection needs with what the server showed.

    Parameters
    ----------
    card : Card
        From `speechbrain_mifuse.lalm.probe.probe`.
    needs : Needs
        Of the collection.

    Returns
    -------
    list of str
        Needs of which the card cannot tell whether they are met, a line each.

    Raises
    ------
    UserError
        If the server lacks something; the message names all of it, each with the remedy.

    Example
    -------
    >>> card = Card("http://127.0.0.1:8000/v1", "m", findings={"honours_n": Finding("no", "1 choice of 3")})
    >>> check(card, Needs(Profile(), samples=5))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: m at http://127.0.0.1:8000/v1 lacks what the collection needs:
      honours_n: no (1 choice of 3): set honours_n: False in the profile
    """
    lacking, untold = [], []
    for finding, remedy in RULES:
        name = finding(card, needs)
        if name is not None:
            line = f"{name}: {card[name].verdict} ({card[name].evidence})"
            lacking += [f"{line}: {remedy(card, needs)}"] * (card[name].verdict == NO)
            untold += [line] * (card[name].verdict == UNKNOWN)
    lacking += _too_long(card, needs)
    if lacking:
        raise UserError("\n  ".join([f"{card.model} at {card.base_url} lacks what the collection needs:", *lacking]))
    return untold


def _needs_constraint(card: Card, needs: Needs) -> str | None:
    return None if needs.profile.constraint == "none" else f"constraint_{needs.profile.constraint}"


def _other_part(card: Card, needs: Needs) -> str:
    heard = card.good(f"hears_{part}" for part in AUDIO_PARTS)
    if heard:
        return f"set audio_part: {heard[0].removeprefix('hears_')} in the profile"
    return "ask a model that takes audio, or a server that passes it on"


def _other_constraint(card: Card, needs: Needs) -> str:
    honoured = card.good(f"constraint_{name}" for name in CONSTRAINTS)
    other = honoured[0].removeprefix("constraint_") if honoured else "none"
    return f"set constraint: {other} in the profile"


def _rejected(card: Card, name: str) -> bool:
    return card[name].value == REJECTED


def _too_long(card: Card, needs: Needs) -> list[str]:
    heard = card["longest_audio"]
    if heard.verdict != NO or needs.longest is None or needs.longest <= float(heard.value or 0):
        return []
    return [
        f"longest_audio: recordings of {needs.longest:g} s ({heard.evidence}): set longest_audio: {heard.value:g} in "
        "the profile, so that the beginning alone is sent"
    ]


RULES = (
    Rule(lambda card, needs: f"hears_{needs.profile.audio_part}", _other_part),
    Rule(_needs_constraint, _other_constraint),
    Rule(
        lambda card, needs: "logprobs" if needs.profile.answer_form == "logprobs" else None,
        lambda card, needs: "set answer_form: distribution in the profile",
    ),
    Rule(
        lambda card, needs: "honours_n" if needs.profile.honours_n and needs.samples > 1 else None,
        lambda card, needs: "set honours_n: False in the profile",
    ),
    # A seed that is ignored does no harm.
    Rule(
        lambda card, needs: "honours_seed" if needs.profile.honours_seed and _rejected(card, "honours_seed") else None,
        lambda card, needs: "set honours_seed: False in the profile",
    ),
    Rule(
        lambda card, needs: "honours_temperature" if needs.samples > 1 and not needs.varied else None,
        lambda card, needs: "all samples of a recording would be equal: ask for one sample, or vary the question",
    ),
)
