"""Servers of other people, started for real where their programs are installed and the environment asks for it."""

import os

import local_servers
import pytest
import torch
from chaos_server import LABELS, noises

from speechbrain_mifuse.lalm.client import LalmClient
from speechbrain_mifuse.lalm.collect import collect
from speechbrain_mifuse.lalm.probe import probe, speech_like
from speechbrain_mifuse.lalm.profile import Profile
from speechbrain_mifuse.lalm.prompt import Prompt
from speechbrain_mifuse.lalm.store import LabelStore, Query
from speechbrain_mifuse.utils.audio import content_hash

# What each is known to do; a simulator's answers say nothing about hearing unless they are the same for all.
KNOWN = {
    "transformers serve": {"hears_input_audio": "yes", "honours_n": "no", "longest_audio": "no", "logprobs": "no"},
    "fakellm": {"hears_input_audio": "no", "honours_n": "no"},
    "xpyd-sim": {"honours_n": "yes", "honours_seed": "no"},
    "aimock": {"hears_input_audio": "no", "honours_temperature": "no"},
}


@pytest.fixture
def program(request):
    """A program that is to be started."""
    found = local_servers.PROGRAMS[request.param]
    if not os.environ.get("MIFUSE_TEST_SERVERS"):
        pytest.skip(f"{request.param}: set MIFUSE_TEST_SERVERS=1 where it is on the PATH ({found.install})")
    if not found.installed:
        pytest.skip(f"{request.param}: not on the PATH ({found.install})")
    return request.param, found


def card_of(url, model, values=None):
    profile = Profile.of(values, base_url=url, model=model)
    return probe(LalmClient.of(profile), profile, speech_like(), show_progress=False)


@pytest.mark.parametrize("program", KNOWN, indirect=True)
def test_a_real_server_shows_what_it_is_known_to_do(program):
    name, found = program
    with found.start() as served:
        card = card_of(served.base_url, served.model, found.profile)
    print(card.text())
    assert {key: card[key].verdict for key in KNOWN[name]} == KNOWN[name]


@pytest.mark.parametrize("program", ["aimock"], indirect=True)
def test_a_collection_from_a_server_with_chaos_switched_on_is_complete_and_right(program, tmp_path):
    faults = ("ratelimit", "drop", "malformed", "disconnect")
    switches = [word for fault in faults for word in (f"--chaos-{fault}", "0.1")]
    prompt = Prompt(LABELS)
    with program[1].start(*switches) as served, LabelStore(tmp_path / "labels.sqlite") as store:
        query = Query.of(prompt, served.model, served.base_url, {"temperature": 1.0, "seed": 0})
        for _ in range(3):
            client = LalmClient.of(Profile(model=served.model, base_url=served.base_url))
            collect(noises(20), prompt, client, store, query, 2, show_progress=False)
        samples = store.load(query, [content_hash(waveform()) for _, waveform in noises(20)], 2)
    assert samples.mask.all() and (samples.probs - torch.tensor([0.7, 0.1, 0.1, 0.1])).abs().max() < 1e-4


def test_a_server_of_the_users_choice_is_probed():
    url, model = os.environ.get("MIFUSE_TEST_SERVER"), os.environ.get("MIFUSE_TEST_MODEL")
    if not url or not model:
        pytest.skip("set MIFUSE_TEST_SERVER to the address of an API, and MIFUSE_TEST_MODEL to a model of it")
    card = card_of(url, model)
    print(card.text())
    assert card.calls > 20 and card.findings
