"""What a server showed of itself when it was probed, and whether that is enough for a collection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from speechbrain_mifuse.lalm.profile import AUDIO_PARTS, CONSTRAINTS, Profile
from speechbrain_mifuse.utils.errors import UserError

YES, NO, UNKNOWN = "yes", "no", "cannot tell"
# Value of a finding where the server does not merely ignore a field but answers with an error.
REJECTED = "rejected"
_NO_SAMPLES = "all samples of a recording would be equal: ask for one sample, or vary the question"
_NO_AUDIO = "ask a model that takes audio, or a server that passes it on"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One capability: "yes", "no" or "cannot tell", what was seen, and a figure where there is one."""

    verdict: str
    evidence: str
    value: float | str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """What a server showed of itself.

    Example
    -------
    >>> card = Card("http://127.0.0.1:8000/v1", "m", findings={"honours_n": Finding(NO, "1 of 3 choices")})
    >>> card["honours_n"].verdict, card["logprobs"].verdict, Card.from_json(card.to_json()) == card
    ('no', 'cannot tell', True)
    """

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

    def good(self, kind: str, names: Iterable[str]) -> list[str]:
        """Keep the names of which the finding is "yes"."""
        return [name for name in names if self[f"{kind}{name}"].verdict == YES]

    def text(self) -> str:
        """Show the card to people."""
        reported = " ".join(filter(None, (self.served_model, self.fingerprint)))
        head = f"{self.model} at {self.base_url}" + (f", reports itself as {reported}" if reported else "")
        spent = f"{self.calls} calls, {self.prompt_tokens} prompt tokens, {self.completion_tokens} tokens of answers"
        wide = max(map(len, self.findings), default=0)
        far = max((len(finding.verdict) for finding in self.findings.values()), default=0)
        rows = [f"{name:{wide}}  {found.verdict:{far}}  {found.evidence}" for name, found in self.findings.items()]
        return "\n".join([head, f"{spent}; audio as {self.audio_part}", "", *rows])

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

    Parameters
    ----------
    profile : Profile
        How it is asked.
    samples : int
        Answers about one recording.
    longest : float, optional
        Seconds of the longest recording, where known.
    varied : bool
        Whether samples are asked for with different questions.
    """

    profile: Profile
    samples: int = 1
    longest: float | None = None
    varied: bool = False


def check(card: Card, needs: Needs) -> list[str]:
    """Hold a card against what a collection needs.

    Parameters
    ----------
    card : Card
        As `probe` gives it.
    needs : Needs
        What the collection needs.

    Returns
    -------
    list of str
        What is needed and not known of the server.

    Raises
    ------
    UserError
        If the server lacks something; the message names all of it, each with what to do.

    Example
    -------
    >>> deaf = Card("http://127.0.0.1:8000/v1", "m", findings={"hears_input_audio": Finding(NO, "counts no tokens")})
    >>> check(deaf, Needs(Profile()))
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: m at http://127.0.0.1:8000/v1 lacks what the collection needs:
      hears_input_audio: no (counts no tokens): ask a model that takes audio, or a server that passes it on
    """
    lacking, unknown = [], []
    for name, remedy in _wanted(card, needs):
        line = f"{name}: {card[name].verdict} ({card[name].evidence})"
        lacking += [f"{line}: {remedy}"] * (card[name].verdict == NO)
        unknown += [line] * (card[name].verdict == UNKNOWN)
    longest = card["longest_audio"]
    if longest.verdict == NO and needs.longest is not None and needs.longest > float(longest.value or 0):
        lacking.append(
            f"longest_audio: recordings of {needs.longest:g} s ({longest.evidence}): set longest_audio: "
            f"{longest.value:g} in the profile, so that the beginning alone is sent"
        )
    if lacking:
        raise UserError("\n  ".join([f"{card.model} at {card.base_url} lacks what the collection needs:", *lacking]))
    return unknown


def _wanted(card: Card, needs: Needs) -> Iterator[tuple[str, str]]:
    """Give the findings that a collection asks for, each with what to do without."""
    profile = needs.profile
    parts, constraints = card.good("hears_", AUDIO_PARTS), [*card.good("constraint_", CONSTRAINTS), "none"]
    yield f"hears_{profile.audio_part}", f"set audio_part: {parts[0]} in the profile" if parts else _NO_AUDIO
    if profile.constraint != "none":
        yield f"constraint_{profile.constraint}", f"set constraint: {constraints[0]} in the profile"
    if profile.answer_form == "logprobs":
        yield "logprobs", "set answer_form: distribution in the profile"
    if profile.honours_n and needs.samples > 1:
        yield "honours_n", "set honours_n: False in the profile"
    # A seed that is ignored does no harm.
    if profile.honours_seed and card["honours_seed"].value == REJECTED:
        yield "honours_seed", "set honours_seed: False in the profile"
    if needs.samples > 1 and not needs.varied:
        yield "honours_temperature", _NO_SAMPLES
