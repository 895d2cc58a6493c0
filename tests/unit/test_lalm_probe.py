import functools
import hashlib
import itertools
import json
import math
import re
import threading

import pytest
from chaos_server import ChaosServer, heard
from lalm_support import LABELS, EnergyRecogniser, completion, scripted_server

from speechbrain_mifuse.cli.main import main
from speechbrain_mifuse.inference.server import EmotionServer
from speechbrain_mifuse.lalm.card import Card, Needs, check, read_card
from speechbrain_mifuse.lalm.client import LalmClient, LalmError
from speechbrain_mifuse.lalm.probe import lengths_up_to, probe, questions, speech_like
from speechbrain_mifuse.lalm.profile import Profile, read_profile
from speechbrain_mifuse.utils.errors import UserError

KEY = "sk-planted-0123456789"
SPEECH = speech_like()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def card_of(url, profile=None, retries=0, **options):
    client = LalmClient(url, "m", max_retries=retries, timeout=10)
    # Short lengths, so that the tests are quick.
    return probe(client, profile or Profile(), SPEECH, **{"show_progress": False, "lengths": (6.0, 9.0), **options})


def verdicts(card):
    return {name: finding.verdict for name, finding in card.findings.items()}


class Model:
    """A chat model in a few lines, whose habits are switched on and off."""

    def __init__(self, **habits):
        self.habits = {
            "hears": True,  # answers depend on the sound
            "counts": True,  # tokens grow with the sound, 25 a second
            "part": "input_audio",  # the only form of audio that reaches it
            "most_seconds": 1000,
            "n": True,
            "seed": True,
            "temperature": True,
            "constraint": None,  # field of the request that is heeded
            "logprobs": None,  # power of the probabilities by temperature
            **habits,
        }
        self.noise, self.lock = itertools.count(), threading.Lock()

    def __call__(self, body, _):
        habits = self.habits
        part = next((part for part in body["messages"][0]["content"] if part["type"] == habits["part"]), None)
        sound = heard({"messages": [{"content": [part]}]}) if part else ""
        # In a WAV file of 16 bits at 16 kHz four characters of base64 are three of 32000 bytes a second.
        seconds = round(len(str(part)) * 0.75 / 32000, 1) if part else 0
        if seconds > habits["most_seconds"]:
            sound, seconds = f"the first {habits['most_seconds']} s", habits["most_seconds"]
        texts = [self.text(body, sound if habits["hears"] else "", j) for j in range(body.get("n", 1))]
        reply = completion(*(texts if habits["n"] else texts[:1]))
        reply["usage"]["prompt_tokens"] = 40 + round(25 * seconds) * habits["counts"]
        if habits["logprobs"] and body.get("logprobs"):
            for choice in reply["choices"]:
                choice["logprobs"] = {"content": [{"token": "angry", "top_logprobs": self.top(body["temperature"])}]}
        return 200, reply

    def text(self, body, sound, j):
        told = body["messages"][0]["content"][-1]["text"]
        if self.habits["constraint"] in body:
            return '{"angry": 1.0, "happy": 0, "neutral": 0, "sad": 0}'
        if "zebra" in told:
            return "zebra"
        warm = body["temperature"] > 0 and self.habits["temperature"]
        with self.lock:
            draw = body["seed"] + j if "seed" in body and self.habits["seed"] else f"unseeded {next(self.noise)}"
        digest = hashlib.sha256(f"{sound}:{draw if warm else 0}".encode()).digest()
        return json.dumps({label: digest[i] + 1 for i, label in enumerate(LABELS)})

    def top(self, temperature):
        sharp = {"raw": 1.0, "processed": 1 / temperature}[self.habits["logprobs"]]
        weights = [p**sharp for p in (0.5, 0.3, 0.1, 0.06, 0.04)]
        named = zip((*LABELS, "hm"), weights, strict=True)
        return [{"token": token, "logprob": math.log(weight / sum(weights))} for token, weight in named]


@functools.cache
def probed(profile=None, lengths=(6.0, 9.0), **habits):
    with scripted_server(Model(**habits)) as (url, _):
        return card_of(url, profile, lengths=lengths)


def test_our_own_server_keeps_what_its_profile_promises():
    with EmotionServer(EnergyRecogniser(), "m") as server:
        card = card_of(server.base_url)
    assert verdicts(card) == {
        "hears_input_audio": "yes",
        "hears_audio_url": "yes",
        "longest_audio": "yes",
        "audio_tokens_per_second": "yes",
        "honours_n": "yes",
        "honours_temperature": "yes",
        "honours_seed": "yes",
        "logprobs": "yes",
        "constraint_structured_outputs": "no",
        "constraint_json_schema": "yes",
        "constraint_regex": "no",
        "json_object": "yes",
    }
    assert card["audio_tokens_per_second"].value == pytest.approx(25)
    assert card["logprobs"].value.startswith("raw")
    assert card.served_model == "m" and "speechbrain-mifuse" in card.fingerprint
    assert check(card, Needs(Profile(), samples=5, longest=9)) == []


def test_our_own_server_gives_one_label_where_a_schema_asks_for_one():
    with EmotionServer(EnergyRecogniser(), "m") as server:
        card = card_of(server.base_url, Profile(answer_form="label", constraint="json_schema"))
    assert '\'{"emotion": ' in card["constraint_json_schema"].evidence


def test_a_model_that_does_all_is_believed():
    card = probed(constraint="regex", logprobs="processed")
    assert (
        card["constraint_regex"].verdict == card["hears_input_audio"].verdict == card["honours_seed"].verdict == "yes"
    )
    assert card["logprobs"].value.startswith("processed")
    assert card["hears_audio_url"].verdict == "no"


def test_audio_that_is_dropped_is_found_out_and_stops_a_collection():
    card = probed(hears=False, counts=False)
    assert card["hears_input_audio"].verdict == "no" and card["longest_audio"].verdict == "cannot tell"
    with pytest.raises(UserError, match=r"hears_input_audio: no.*ask a model that takes audio"):
        check(card, Needs(Profile()))


def test_tokens_that_grow_do_not_prove_that_the_sound_is_heard():
    card = probed(hears=False)
    assert card["hears_input_audio"].verdict == "cannot tell"
    assert "hears_input_audio" in check(card, Needs(Profile()))[0]


def test_answers_that_follow_the_bytes_of_the_request_are_not_taken_for_hearing():
    def echo(body, _):
        return 200, completion(hashlib.sha256(json.dumps(body).encode()).hexdigest())

    with scripted_server(echo) as (url, _):
        card = card_of(url)
    assert card["hears_input_audio"].verdict == "no" and "bytes of the file" in card["hears_input_audio"].evidence


def test_unsteady_answers_at_temperature_zero_do_not_count_as_hearing():
    draws = itertools.count()
    with scripted_server(lambda *_: (200, completion(f"text {next(draws)}"))) as (url, _):
        assert card_of(url)["hears_input_audio"].verdict == "cannot tell"


def test_the_form_of_audio_that_is_heard_is_the_remedy():
    card = probed(part="audio_url")
    with pytest.raises(UserError, match="set audio_part: audio_url in the profile"):
        check(card, Needs(Profile()))
    card = probed(Profile(audio_part="audio_url"), part="audio_url")
    assert not [line for line in check(card, Needs(Profile(audio_part="audio_url"))) if "hears" in line]


def test_n_that_is_ignored_stops_a_collection_of_several_samples_alone():
    card = probed(n=False)
    assert card["honours_n"].evidence == "1 of 3 choices"
    with pytest.raises(UserError, match=r"honours_n: no \(1 of 3 choices\): set honours_n: False in the profile"):
        check(card, Needs(Profile(), samples=5))
    assert check(card, Needs(Profile(), samples=1)) == check(card, Needs(Profile(honours_n=False), samples=5)) == []


def test_a_seed_that_is_ignored_is_told_and_one_that_is_rejected_stops_a_collection():
    assert (card := probed(seed=False))["honours_seed"].verdict == "no"
    assert check(card, Needs(Profile(), samples=5)) == []
    model = Model()

    def rejecting(body, headers):
        return (400, {"error": {"message": "unknown field seed"}}) if "seed" in body else model(body, headers)

    with scripted_server(rejecting) as (url, _):
        card = card_of(url)
    assert "unknown field seed" in card["honours_seed"].evidence
    with pytest.raises(UserError, match="set honours_seed: False in the profile"):
        check(card, Needs(Profile()))
    assert check(card, Needs(Profile(honours_seed=False))) == []


def test_temperature_that_changes_nothing_stops_a_collection_unless_the_questions_vary():
    card = probed(temperature=False)
    assert (card["honours_temperature"].verdict, card["honours_seed"].verdict) == ("no", "cannot tell")
    with pytest.raises(UserError, match="all samples of a recording would be equal"):
        check(card, Needs(Profile(), samples=5))
    assert check(card, Needs(Profile(), samples=5, varied=True)) == check(card, Needs(Profile(), samples=1)) == []


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_log_probabilities_are_told_apart_by_two_temperatures(kind):
    finding = probed(logprobs=kind)["logprobs"]
    assert finding.verdict == "yes" and finding.value.startswith(kind) and "0.96" in finding.evidence


def test_missing_log_probabilities_stop_a_collection_that_reads_them():
    with pytest.raises(UserError, match=r"logprobs: no.*set answer_form: distribution"):
        check(probed(), Needs(Profile(answer_form="logprobs")))


def test_a_constraint_that_is_ignored_with_status_200_is_found_out_and_a_working_one_named():
    profile = Profile(constraint="structured_outputs")
    card = probed(profile, constraint="response_format")
    assert card["constraint_structured_outputs"].verdict == "no" and "'zebra'" in card["constraint_regex"].evidence
    with pytest.raises(UserError, match="set constraint: json_schema in the profile"):
        check(card, Needs(profile))


def test_the_longest_audio_heard_is_found_and_longer_recordings_stop_a_collection():
    card = probed(lengths=(10.0, 30.0, 60.0), most_seconds=30)
    assert (card["longest_audio"].verdict, card["longest_audio"].value) == ("no", 30)
    with pytest.raises(UserError, match=r"recordings of 45 s.*set longest_audio: 30 in the profile"):
        check(card, Needs(Profile(), longest=45))
    assert check(card, Needs(Profile(), longest=30)) == []


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (429, {"error": {"message": "slow down"}}, "slow down"),
        (500, b"out of memory", "out of memory"),
        (200, {"error": {"message": "no capacity", "code": 503}}, "no capacity"),
        (200, b'data: {"choices": [{"delta": {"content": "sad"}}]}\n\n', "stream of events"),
    ],
)
def test_a_server_that_answers_nothing_is_an_error_after_two_calls_and_not_a_card(status, body, said):
    with scripted_server(lambda *_: (status, body)) as (url, requests):
        with pytest.raises(LalmError, match=rf"{said}[\s\S]*with and without audio failed"):
            card_of(url)
        assert len(requests) == 2


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"detail": "model 'm' is not served here"}),
        (422, [{"error": {"message": "model 'm' is not served here"}}]),
        (200, {"error": {"message": "model 'm' is not served here", "type": "invalid_request_error"}}),
    ],
)
def test_a_server_that_rejects_every_call_is_an_error_and_not_deaf(status, body, capfd):
    with scripted_server(lambda *_: (status, body)) as (url, _), pytest.raises(SystemExit) as stopped:
        main(["probe", "--lalm_base_url", url, "--lalm_model", "m"])
    shown = capfd.readouterr()
    assert stopped.value.code == 2 and "hears_input_audio" not in shown.out
    assert re.search(r"model 'm' is not served here[\s\S]*calls failed", shown.err)


@pytest.mark.parametrize(("code", "named"), [(401, "OPENAI_API_KEY"), ("model_not_found", "--lalm_model")])
def test_an_error_in_a_reply_with_status_200_stops_the_probe_too(code, named):
    with scripted_server(lambda *_: (200, {"error": {"message": "no", "code": code}})) as (url, requests):
        with pytest.raises(LalmError, match=named):
            card_of(url)
        assert len(requests) == 1


def test_a_model_that_rejects_audio_alone_is_deaf_and_its_server_is_quoted():
    def script(body, _):
        if any(part["type"] != "text" for part in body["messages"][0]["content"]):
            return 400, {"detail": [{"loc": ["body", "messages"], "msg": "this model takes text only"}]}
        return 200, completion("angry")

    with scripted_server(script) as (url, _):
        finding = card_of(url)["hears_input_audio"]
    assert finding.verdict == "no" and "HTTP 400: body.messages: this model takes text only" in finding.evidence


def test_some_faults_among_the_calls_change_no_verdict():
    with ChaosServer(["rate_limit_and_say_how_long"], rate=0.3) as faulty, ChaosServer() as sound:
        assert verdicts(card_of(faulty.base_url, retries=6)) == verdicts(card_of(sound.base_url))
        assert faulty.drawn["rate_limit_and_say_how_long"] > 3


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_is_found_out_by_one_call(status):
    with scripted_server(lambda *_: (status, {"error": {"message": "no"}})) as (url, requests):
        with pytest.raises(LalmError, match="OPENAI_API_KEY" if status == 401 else "--lalm_model"):
            card_of(url)
        assert len(requests) == 1


def test_the_key_reaches_neither_card_nor_screen(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def echo(body, headers):
        said = headers["Authorization"]
        if body["temperature"] > 0:
            return 400, {"error": {"message": said}}
        return 200, completion(said, model=said)

    with scripted_server(echo) as (url, _), pytest.raises(SystemExit):
        main(["probe", "--lalm_base_url", url, "--lalm_model", "m", "--json", str(tmp_path / "card.json")])
    assert KEY not in "".join(capfd.readouterr()) + (tmp_path / "card.json").read_text()
    assert "***" in (tmp_path / "card.json").read_text()


def test_the_command_says_how_much_it_will_ask_and_asks_no_more(tmp_path, capfd):
    with scripted_server(Model()) as (url, requests):
        main(["probe", "--lalm_base_url", url, "--lalm_model", "m", "--json", str(tmp_path / "card.json")])
    shown = capfd.readouterr().out
    assert shown.startswith(f"{len(requests)} calls with 200 s of audio in all to m at {url}")
    card = read_card(tmp_path / "card.json")
    assert card.text() in shown and card.calls == len(requests) == len(questions(Profile(), 1.0, lengths_up_to(None)))


def test_the_command_ends_with_status_2_where_the_server_lacks_something(tmp_path, capfd):
    profile = tmp_path / "profile.yaml"
    profile.write_text("name: x\nmodel: m\nconstraint: regex\nsampling: {max_tokens: 50}\n")
    with scripted_server(Model(n=False)) as (url, requests), pytest.raises(SystemExit) as stopped:
        main(["probe", "--profile", str(profile), "--lalm_base_url", url])
    assert stopped.value.code == 2 and all(body["max_tokens"] == 50 for body in requests)
    shown = capfd.readouterr()
    assert "hears_input_audio" in shown.out
    assert "set honours_n: False" in shown.err and "set constraint: none" in shown.err


def test_a_recording_of_the_user_is_sent(tmp_path):
    import soundfile

    path = tmp_path / "mine.wav"
    soundfile.write(path, SPEECH.numpy()[:24000], 16000)
    with ChaosServer() as server:
        main(["probe", "--lalm_base_url", server.base_url, "--lalm_model", "m", "--audio", str(path)])
        mine = hashlib.sha256(path.read_bytes()[44:]).hexdigest()
        assert sum(entry.audio == mine for entry in server.asked) > 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--audio", "/nowhere.wav"], "/nowhere.wav"),
        (["--profile", "/nowhere.yaml"], "--profile /nowhere.yaml"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(arguments, named, capfd):
    with pytest.raises(SystemExit):
        main(["probe", "--lalm_base_url", "http://127.0.0.1:9/v1", "--lalm_model", "m", *arguments])
    assert named in capfd.readouterr().err


def test_clips_too_short_and_lengths_out_of_order_are_refused():
    client = LalmClient("http://127.0.0.1:9/v1", "m")
    with pytest.raises(UserError, match="at least one second"):
        probe(client, Profile(), SPEECH[:8000])
    with pytest.raises(UserError, match="ascending"):
        probe(client, Profile(), SPEECH, lengths=(30.0, 10.0))


def test_card_and_profile_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "x"
    for text in ("", "[]", "{}", '{"findings": {"n": 1}}', "a: b"):
        path.write_text(text)
        with pytest.raises(UserError, match="no capability card"):
            read_card(path)
    path.write_text("- 1")
    with pytest.raises(UserError, match="--profile"):
        read_profile(path)
    path.write_text("nonsense: 1")
    with pytest.raises(UserError, match="nonsense"):
        read_profile(path)


def test_all_that_is_lacking_is_named_at_once():
    card = probed(n=False, temperature=False)
    with pytest.raises(UserError) as caught:
        check(card, Needs(Profile(answer_form="logprobs"), samples=5))
    assert len(str(caught.value).splitlines()) == 4


def test_an_empty_card_tells_nothing_and_stops_nothing():
    untold = check(Card("http://127.0.0.1:9/v1", "m"), Needs(Profile(constraint="regex"), samples=5))
    assert [line.split(":")[0] for line in untold] == [
        "hears_input_audio",
        "constraint_regex",
        "honours_n",
        "honours_temperature",
    ]


def test_one_sound_is_also_sent_in_other_bytes():
    with scripted_server(Model()) as (url, requests):
        card_of(url)
    parts = [part for body in requests for part in body["messages"][0]["content"]]
    files = {part["input_audio"]["data"] for part in parts if part["type"] == "input_audio"}
    sounds = {heard(body) for body in requests} - {""}
    assert len(files) == len(sounds) + 1 == 6
