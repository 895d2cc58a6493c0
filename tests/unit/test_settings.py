"""Settings of recipes: flags read literally, and everything that cannot work refused before anything is made of it."""

import math
from pathlib import Path

import pytest

from speechbrain_mifuse.experiments.settings import RULES, load_hparams, overrides_of, parse_arguments
from speechbrain_mifuse.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("2024-05-01", "1e3", "yes", "0123", "1:30", "a path: # with yaml", "[x]", "{x}", 'it\'s "quoted"', "a=b"),
    *("lang=pl: #1", "x + 1 * 2", "*x", "&x", "-x.wav", "back\\slash", "ünïcode", "(3, 4)", "%d", "true", "~"),
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(recipe, *flags):
    return load_hparams(f"hparams/{recipe}.yaml", flags)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joined", [True, False])
def test_a_path_is_taken_as_it_is_typed_whatever_yaml_would_make_of_it(name, joined, tmp_path):
    flags = [f"--data_folder={name}"] if joined else ["--data_folder", name]
    (tmp_path / "toy.yaml").write_text("data_folder: null\nsource_data_folder: !ref <data_folder>\nseed: 1\n")
    hparams, _ = load_hparams(tmp_path / "toy.yaml", [*flags, "--seed", "2"])
    assert hparams == {"data_folder": name, "source_data_folder": name, "seed": 2}


def test_names_and_lists_of_names_are_text_and_null_is_none():
    hparams = load("nemo2rav", "--output_folder", "yes", "--labels", "[yes, 2024-05-01]", "--encoder", "1e3")
    assert hparams["labels"] == ["yes", "2024-05-01"] and hparams["encoder"] == "1e3"
    assert hparams["label_store"] == "yes/labels.sqlite"
    assert load("msp2iem", "--lalm_base_url", "null")["lalm_base_url"] is None
    assert load("adapter_ravdess", "--folds", "[[01], [02]]")["folds"] == [["01"], ["02"]]


def test_numbers_lists_with_spaces_and_tags_are_yaml():
    assert load("nemo2rav", "--learning_rate", "1e-3")["learning_rate"] == 0.001
    hparams = load("nemo2rav", "--method", "[source_only,", "mi_fuse]", "--lalm_profile", "!include:lalm/openai.yaml")
    assert hparams["method"] == ["source_only", "mi_fuse"] and "openai" in hparams["lalm_base_url"]
    assert overrides_of({"encoder_layers": (1, 2), "feature_folder": Path("a")}) == {
        "encoder_layers": [1, 2],
        "feature_folder": "a",
    }


def test_options_of_speechbrain_are_no_keys_of_the_recipe():
    _, run_opts, overrides = parse_arguments(["a.yaml", "--device", "cpu", "--seed=3", "--noprogressbar"])
    assert run_opts["device"] == "cpu" and run_opts["noprogressbar"] and overrides == {"seed": 3}


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        # Flags.
        ("nemo2rav", ["--seed"], "--seed: a value is missing"),
        ("nemo2rav", ["--data_folder="], "--data_folder: a value is missing"),
        ("nemo2rav", ["--data_folder", "--seed", "1"], "--data_folder: a value is missing"),
        ("nemo2rav", ["--seed", "1", "--seed=2"], "--seed: is given twice"),
        ("nemo2rav", ["--sead", "1"], "--sead: .* Did you mean --seed?"),
        ("nemo2rav", ["--devise", "cpu"], "Did you mean --device?"),
        ("nemo2rav", ["other.yaml"], "other.yaml: is not a flag"),
        ("nemo2rav", ["--seed", "[1"], r"--seed: '\[1' cannot be read as YAML"),
        ("nemo2rav", ["--data_folder", "<seed>"], "holds <...>"),
        (
            "nemo2rav",
            ["--source_classifier", "{number_of_epoch: 1}"],
            "no key 'number_of_epoch'. Did you mean number_of_epochs?",
        ),
        ("nemo2rav", ["--lalm_profile", "!include:lalm/nowhere.yaml"], "nowhere.yaml is missing"),
        ("nowhere", [], "hparams/nowhere.yaml: no such file"),
        # Counts and ranges.
        ("nemo2rav", ["--number_of_steps", "0"], "--number_of_steps 0: must be a whole number of at least 1"),
        ("nemo2rav", ["--number_of_steps", "ten"], "--number_of_steps ten: must be a whole number of at least 1"),
        ("nemo2rav", ["--number_of_steps", "true"], "--number_of_steps true: must be"),
        ("nemo2rav", ["--number_of_steps", "1.5"], "--number_of_steps 1.5: must be"),
        ("nemo2rav", ["--batch_size", "0"], "--batch_size 0: must be a whole number of at least 2"),
        ("nemo2rav", ["--batch_size", "1"], "--batch_size 1: .* because batch normalization"),
        ("nemo2rav", ["--source_classifier", "{batch_size: 1}"], '--source_classifier "{batch_size: 1}": must be'),
        ("nemo2rav", ["--lalm_samples", "0"], "--lalm_samples 0: must be"),
        ("nemo2rav", ["--lalm_temperature", "-1"], "--lalm_temperature -1: must be a finite number of at least 0"),
        ("nemo2rav", ["--learning_rate", "-0.1"], "--learning_rate -0.1: must be a finite number above 0"),
        ("nemo2rav", ["--learning_rate", ".nan"], "--learning_rate nan: must be"),
        ("nemo2rav", ["--temperature", ".inf"], "--temperature inf: must be"),
        ("nemo2rav", ["--temperature", "0"], "--temperature 0: must be"),
        ("nemo2rav", ["--seed", "-1"], "--seed -1: must be a whole number from 0 to 4294967295"),
        ("nemo2rav", ["--seed", "null"], "--seed null: must be"),
        ("nemo2rav", ["--labels", "[angry]"], "must be a list of at least two different classes"),
        ("nemo2rav", ["--labels", "[sad, sad]"], "must be a list of at least two different classes"),
        ("nemo2rav", ["--layer", "7"], "--layer 7: is not stored. Add it to --encoder_layers"),
        ("nemo2rav", ["--output_folder", "null"], "--output_folder null: must be the path of a folder"),
        ("nemo2rav", ["--lalm_budget", "-1"], "--lalm_budget -1: must be"),
        ("classifier_ravdess", ["--dropout", "1"], "--dropout 1: must be a number from 0 up to, but not including, 1"),
        ("classifier_ravdess", ["--number_of_epochs", "0"], "--number_of_epochs 0: must be"),
        ("classifier_ravdess", ["--class_balanced", "maybe"], "--class_balanced maybe: must be true or false"),
        ("adapter_ravdess", ["--d_model", "10", "--n_heads", "3"], "--d_model 10: must be a multiple of --n_heads"),
        ("adapter_ravdess", ["--seeds", "[]"], "--seeds .*: must be a list"),
        ("adapter_ravdess", ["--labels_per_class", "0"], "--labels_per_class 0: must be 'all', a whole number"),
        ("adapter_ravdess", ["--ema_end", "1.5"], "--ema_end 1.5: must be a number from 0 to 1"),
        ("adapter_ravdess", ["--adapter", "{mask_share: 2}"], '--adapter "{mask_share: 2}": must be'),
        ("zsfuse_ravdess", ["--audio_repeats", "[0]"], r"--audio_repeats \[0\]: must be a list"),
        ("dual_encoder_ravdess", ["--batch_size", "1"], "--batch_size 1: must be"),
    ],
)
def test_what_cannot_work_is_one_error_that_names_flag_value_and_what_is_allowed(recipe, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        load(recipe, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "hparams").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_passes_its_own_checks(path):
    assert load_hparams(path, [])[0]


def test_a_sampling_temperature_of_a_provider_is_no_temperature_of_the_fusion(tmp_path):
    (tmp_path / "toy.yaml").write_text("lalm_profile: {sampling: {temperature: 0}}\n")
    assert load_hparams(tmp_path / "toy.yaml", [])


def test_no_rule_takes_nan():
    numbers = [rule for rule in RULES.values() if "number" in rule.wanted]
    assert len(numbers) > 20 and all(rule.fault(math.nan) for rule in numbers)
