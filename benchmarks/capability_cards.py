"""Start every local server whose program is on the PATH, probe it, and put the cards into `docs/label_collection.md`.

    make demo                                       # trains the recogniser that our own server serves
    python benchmarks/capability_cards.py           # or with --print, which writes nothing

How the others are installed, the page says for those that were missing. `aimock` is also asked for labels with its
chaos switches on.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import local_servers
from chaos_server import LABELS, noises

from speechbrain_mifuse.lalm.card import Card
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.probe import probe, speech_like
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import content_hash
from speechbrain_mifuse.utils.errors import one_clear_error
from speechbrain_mifuse.utils.files import atomic_write
from speechbrain_mifuse.utils.progress import progress

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "label_collection.md"
BLOCK = re.compile(r"(<!-- begin capability cards -->\n).*?(<!-- end capability cards -->)", re.DOTALL)
RECOGNISER = ROOT / "results" / "demo" / "1" / "teacher" / "recogniser"
CHAOS = {"--chaos-ratelimit": 0.15, "--chaos-drop": 0.15, "--chaos-malformed": 0.1, "--chaos-disconnect": 0.1}


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recogniser", type=Path, default=RECOGNISER, help="for our own server (default: the demo's)")
    parser.add_argument("--print", action="store_true", help="write nothing")
    chosen = parser.parse_args(arguments)
    with one_clear_error():
        text = page_part(chosen.recogniser)
    print(text)
    if not chosen.print:
        page = PAGE.read_text(encoding="utf-8")
        atomic_write(PAGE, BLOCK.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page))


def page_part(recogniser: Path) -> str:
    """Probe all servers; a table of verdicts, the cards, and what could not be run."""
    cards, notes = {}, []
    with local_servers.mifuse_serve(recogniser) as served:
        cards["speechbrain-mifuse serve"] = card_of(served, {})
    for name, program in local_servers.PROGRAMS.items():
        if program.installed:
            with program.start() as served:
                cards[name] = card_of(served, program.profile)
            notes.append(f"- `{name}`: {program.about}; `{program.install}`.")
        else:
            notes.append(f"- `{name}` was not probed: it is not installed here (`{program.install}`).")
    if local_servers.PROGRAMS["aimock"].installed:
        notes.append(f"- {under_chaos()}")
    told = [f"```\n{without_port(card.text())}\n```" for card in cards.values()]
    return "\n\n".join([table(cards), "\n".join(notes), *told])


def card_of(served: local_servers.Served, values: dict) -> Card:
    """Probe one server."""
    profile = Profile.of(values, model=served.model, base_url=served.base_url)
    return probe(LalmClient.of(profile), profile, speech_like())


def table(cards: dict[str, Card]) -> str:
    """All verdicts side by side."""
    names = list(dict.fromkeys(name for card in cards.values() for name in card.findings))
    lines = ["| | " + " | ".join(f"`{name}`" for name in cards) + " |", "|---|" + "---|" * len(cards)]
    lines += [f"| {name} | " + " | ".join(card[name].verdict for card in cards.values()) + " |" for name in names]
    return "\n".join(lines)


def without_port(text: str) -> str:
    """A card whose address is not that of one run."""
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)


def under_chaos(count: int = 60, k: int = 5) -> str:
    """Collect labels from `aimock` while it fails; one line on what came of it."""
    switches = [word for name, rate in CHAOS.items() for word in (name, str(rate))]
    prompt, runs, failures = Prompt(LABELS), 0, 0
    with tempfile.TemporaryDirectory() as folder, local_servers.aimock(*switches) as served:
        profile = Profile(model=served.model, base_url=served.base_url, honours_n=False)
        query = Query.of(prompt, served.model, served.base_url, {"temperature": 1.0, "seed": 0})
        with LabelStore(Path(folder) / "labels.sqlite") as store, progress(desc="aimock, chaos", unit="run") as bar:
            while len(store.have(query)) < count * k and runs < 10:
                runs += 1
                bar.update()
                try:
                    client = LalmClient.of(profile)
                    failures += len(collect(noises(count), prompt, client, store, query, k, show_progress=False).failed)
                except LalmError:
                    failures += 1
            samples = store.load(query, [content_hash(waveform()) for _, waveform in noises(count)], k)
    right = (samples.probs[samples.mask][:, 0] - 0.7).abs() < 1e-4
    rates = ", ".join(f"`{name} {rate:g}`" for name, rate in CHAOS.items())
    return (
        f"`aimock` asked for labels with {rates}: {len(right)} of {count * k} samples stored after {runs} run(s), "
        f"{int((~right).sum())} of them wrong, {failures} utterance(s) reported as failed on the way."
    )


if __name__ == "__main__":
    main()
