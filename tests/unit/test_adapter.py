"""The adapter: padding, masks, teacher, codebook, losses; training without labels that no kill changes; files."""

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mifuse.adaptation.method import described
from speechbrain_mifuse.brains import adapter as brains
from speechbrain_mifuse.corpora.folds import fold_splits, prepare_folds
from speechbrain_mifuse.corpora.manifest import LABELS, CorpusError
from speechbrain_mifuse.corpora.ravdess import prepare_ravdess_8
from speechbrain_mifuse.experiments.adapter_variants import pretraining_audio
from speechbrain_mifuse.experiments.comparison import few_labels
from speechbrain_mifuse.experiments.recipes import load_recipe
from speechbrain_mifuse.experiments.same_settings import SettingsError
from speechbrain_mifuse.features.front import StoredFrames
from speechbrain_mifuse.features.prosody import ProsodyReader
from speechbrain_mifuse.inference.recognizer_folder import load_classifier
from speechbrain_mifuse.nnet import adapter_objectives as objectives
from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier, MeanPooling
from speechbrain_mifuse.nnet.adapter_files import AdapterError, export_adapter, load_adapter
from speechbrain_mifuse.nnet.adapter_losses import local_attribute_prediction, mask_prediction, mean_where
from speechbrain_mifuse.nnet.block_masking import block_mask, draw_masks
from speechbrain_mifuse.nnet.ema import ema_copy, linear_decay
from speechbrain_mifuse.nnet.local_attributes import LocalAttributes
from speechbrain_mifuse.nnet.wap_transformer import WAPTransformer
from speechbrain_mifuse.report.variant_report import arm_table, pooled_counts
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.files import atomic_write

D = 6
HPARAMS = Path(__file__).parents[2] / "hparams"
CLASSIFIER = load_recipe("recipes/RAVDESS/classifier/train.py")
RECIPE = load_recipe("recipes/RAVDESS/adapter/pretrain.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wap(**options):
    """A small adapter whose every part matters."""
    adapter = WAPTransformer(D, **{"n_heads": 2, "dropout": 0.0, **options})
    torch.nn.init.normal_(adapter.layer_logits)
    adapter.standardise_by(torch.randn(D), torch.rand(D) + 0.5)
    return adapter


def padded(alone, value=1e3):
    """One batch of utterances, and its relative lengths."""
    counts = torch.tensor([len(frames) for frames in alone])
    return torch.nn.utils.rnn.pad_sequence(alone, True, value), counts / counts.max()


# Network


@pytest.mark.parametrize("options", [{}, {"d_model": 8}], ids=["same size", "projected"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_padding_has_no_influence_on_adapted_frames(options, training):
    adapter, alone = wap(**options).train(training), [torch.randn(count, D) for count in (3, 9, 1, 6)]
    together = adapter(*padded(alone))
    for row, frames in zip(together, alone, strict=True):
        expected = adapter(frames.unsqueeze(0))[0]
        torch.testing.assert_close(row[: len(frames)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", [MeanPooling, None], ids=["mean", "attentive"])
def test_padding_has_no_influence_on_the_logits_of_an_arm(pooling):
    options = {} if pooling is None else {"pooling": pooling}
    model, alone = AdapterClassifier(D, 4, wap(), **options).eval(), [torch.randn(count, D) for count in (4, 9, 1)]
    expected = torch.cat([model(frames.unsqueeze(0), torch.ones(1)) for frames in alone])
    torch.testing.assert_close(model(*padded(alone)), expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_averages_its_layers_outputs_and_leaves_its_input_out():
    adapter, frames = wap().eval(), torch.randn(2, 5, D)
    standardised = (frames - adapter.centre) / adapter.spread
    hidden, outputs = standardised, []
    for layer in adapter.layers:
        hidden = layer(hidden)
        outputs.append(hidden)
    weights = adapter.layer_logits.exp() / adapter.layer_logits.exp().sum()
    expected = weights[0] * outputs[0] + weights[1] * outputs[1] + weights[2] * outputs[2]
    torch.testing.assert_close(adapter(frames), expected, atol=1e-5, rtol=1e-5)


def test_attention_of_the_pooling_sums_to_one_over_true_frames():
    pooling = AdapterClassifier(D, 4).pooling
    torch.nn.init.normal_(pooling.score.weight)
    attention = pooling.attention(*padded([torch.randn(3, D), torch.randn(5, D)]))
    torch.testing.assert_close(attention.sum(1), torch.ones(2))
    assert (attention[0, 3:] == 0).all() and (attention[0, :3] > 0).all()


def test_a_frozen_adapter_is_probed_without_dropout_and_does_not_move():
    model = AdapterClassifier(D, 4, wap(dropout=0.5), MeanPooling, dropout=0.0, frozen=True).train()
    frames, lengths = torch.randn(8, 5, D), torch.ones(8)
    torch.testing.assert_close(model(frames, lengths), model(frames, lengths))
    assert not any(parameter.requires_grad for parameter in model.adapter.parameters())


# Masks


@pytest.mark.parametrize("frames", [2, 5, 11, 19, 20, 60, 200])
def test_a_mask_covers_its_share_to_within_a_block_and_leaves_something(frames):
    width = max(1, min(10, frames // 2))
    for seed in range(20):
        mask = block_mask(frames, 0.8, 10, torch.Generator().manual_seed(seed))
        assert 0 < mask.sum() < frames
        assert abs(mask.sum() - 0.8 * frames) <= width
        covered = "".join("x" if one else "." for one in mask.tolist()).strip("x").split(".")
        assert all(len(block) >= width for block in covered if block)


def test_every_frame_is_as_likely_to_be_masked():
    masks = [block_mask(50, 0.5, 10, torch.Generator().manual_seed(seed)).float() for seed in range(800)]
    share = torch.stack(masks).mean(0)
    assert share.min() > 0.35 and share.max() < 0.65


def test_one_frame_alone_is_never_masked_and_its_loss_is_nothing():
    mask = block_mask(1, 0.8, 10, torch.Generator())
    assert not mask.any()
    assert mask_prediction(torch.ones(1, 1, D), torch.zeros(1, 1, D), mask.unsqueeze(0)) == 0


def test_a_mask_depends_on_utterance_epoch_and_seed_and_not_on_the_batch():
    together, keys = draw_masks(["a", "b"], [30, 50], 0.5, 5, seed=1, epoch=2)
    alone, own_keys = draw_masks(["a"], [30], 0.5, 5, seed=1, epoch=2)
    assert torch.equal(together[0, :30], alone[0]) and torch.equal(keys[0, :30], own_keys[0])
    for changed in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(alone, draw_masks(["a"], [30], 0.5, 5, **changed)[0])


# Teacher


def test_the_teacher_follows_its_schedule_exactly_and_goes_on_where_a_checkpoint_was():
    start, schedule, student = torch.nn.Linear(3, 2), linear_decay(0.5, 0.9, 4), torch.nn.Linear(3, 2)
    teacher, expected = ema_copy(start, schedule), start.weight.detach().clone().double()
    for update, alpha in enumerate((0.5, 0.6, 0.7, 0.8, 0.9, 0.9)):
        torch.nn.init.normal_(student.weight)
        if update == 3:
            state, teacher = teacher.state_dict(), ema_copy(torch.nn.Linear(3, 2), schedule)
            teacher.load_state_dict(state)
        teacher.update_parameters(student)
        expected = alpha * expected + (1 - alpha) * student.weight.detach()
    torch.testing.assert_close(teacher.module.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert not teacher.module.training and not teacher.module.weight.requires_grad


# Codebook


def test_a_codebook_assigns_as_a_search_over_all_codes_does():
    attributes, frames = LocalAttributes(D, size=17), torch.randn(200, D)
    attributes.update(frames, torch.rand(200))
    brute = torch.stack([(frames - code).square().sum(1) for code in attributes.codes], dim=1).argmin(1)
    assert torch.equal(attributes.assign(frames), brute)


def test_a_codebook_moves_by_its_averages():
    attributes = LocalAttributes(D, size=4, decay=0.9)
    first = torch.randn(50, D)
    attributes.update(first, torch.rand(50))
    counts, sums = attributes.counts.clone(), attributes.sums.clone()
    second = torch.randn(50, D)
    ids = attributes.assign(second)
    attributes.update(second, torch.rand(50))
    for code in range(4):
        chosen = second[ids == code]
        count = 0.9 * counts[code] + 0.1 * len(chosen)
        total = 0.9 * sums[code] + 0.1 * chosen.sum(0)
        torch.testing.assert_close(attributes.codes[code], total / count, atol=1e-5, rtol=1e-5)


def test_codes_that_nothing_is_near_are_put_onto_frames_and_used_again():
    attributes = LocalAttributes(2, size=8, dead_share=0.2)
    attributes.update(torch.zeros(20, 2), torch.rand(20))
    frames = torch.cat([torch.randn(20, 2) * 0.01 + centre for centre in torch.tensor([[0.0, 9.0], [9.0, 0.0]])])
    assert len(attributes.assign(frames).unique()) == 1
    reseeded = 0.0
    for _ in range(40):
        attributes.update(frames, torch.rand(len(frames)))
        reseeded += attributes.statistics()["codes_reseeded"]
    assert reseeded >= 6 and len(attributes.assign(frames).unique()) >= 4


def test_perplexity_is_the_number_of_codes_used_alike():
    attributes = LocalAttributes(1, size=4)
    attributes.usage.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    told = attributes.statistics()
    assert told["codebook_perplexity"] == pytest.approx(2) and told["codes_used"] == 2
    assert attributes.usage.sum() == 0


def test_a_codebook_is_restored_exactly():
    attributes, restored = LocalAttributes(D, size=5), LocalAttributes(D, size=5)
    for _ in range(3):
        attributes.update(torch.randn(30, D), torch.rand(30))
    restored.load_state_dict(attributes.state_dict())
    frames, keys = torch.randn(30, D), torch.rand(30)
    assert torch.equal(attributes.update(frames, keys), restored.update(frames, keys))
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in attributes.state_dict().items())


# Losses and objectives


def test_local_attributes_are_predicted_under_the_mask_alone():
    logits, attributes = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    masked = torch.zeros(2, 5, dtype=torch.bool)
    masked[0, 1] = masked[1, 4] = True
    probs = logits.softmax(-1)
    expected = -(probs[0, 1, attributes[0, 1]].log() + probs[1, 4, attributes[1, 4]].log()) / 2
    torch.testing.assert_close(local_attribute_prediction(logits, attributes, masked), expected)
    assert mean_where(torch.ones(2), torch.zeros(2, dtype=torch.bool)) == 0


def test_spans_share_an_attribute_and_count_as_masked_when_most_of_them_is():
    views = objectives.toy_views(D)
    objective = objectives.LocalAttributePrediction(size=3, span=4)
    objective.build(D, D)
    objective(views, "attributes")
    # Frames 2 and 3 of 6 are masked: half of the first span, none of the second.
    assert objective(views, "attributes") == 0
    assert objectives.span_counts(views.masked, 4).tolist() == [[2, 0], [2, 0]]


def test_the_student_never_sees_a_masked_frame():
    objective = objectives.MaskPrediction()
    objective.build(D, D)
    student = objectives.AdapterPretraining(wap(), {"mask_prediction": objective})
    seen = []
    student.adapter.encode = lambda frames, lengths: seen.append(frames) or torch.zeros(2, 6, D)
    views = objectives.toy_views(D)
    student(views, torch.ones(2))
    assert torch.equal(seen[0][views.masked], student.mask_frame.expand(4, D))
    assert torch.equal(seen[0][~views.masked], views.inputs[~views.masked])


def test_speaker_centred_targets_hold_nothing_of_the_speaker_and_their_controls_do():
    speakers = ["a", "b"] * 20
    offset = torch.tensor([[5.0], [-5.0]] * 20)
    vectors = torch.randn(40, 8) + offset
    survey = objectives.UtteranceSurvey([f"t-{i}" for i in range(40)], vectors, speakers, prosody=None)

    def gap(kind, centre):
        objective = kind(centre=centre, components=4, prosody_components=0)
        found = torch.stack(list(objective.prepare(survey).values()))
        return found, (found[::2].mean(0) - found[1::2].mean(0)).norm()

    own, of_speaker = gap(objectives.UtteranceStatistics, objectives.speaker_centred)
    _, left_in = gap(objectives.UtteranceStatistics, objectives.corpus_centred)
    permuted, _ = gap(objectives.PermutedUtteranceStatistics, objectives.speaker_centred)
    assert of_speaker < 1e-4 < 1 < left_in
    assert own.square().mean() == pytest.approx(1, abs=1e-4)
    assert not (own == permuted).all(1).any() and torch.equal(own.sort(0).values, permuted.sort(0).values)


# Training


OBJECTIVES = {
    "mask_prediction": functools.partial(objectives.MaskPrediction, weight=1.0),
    "frame_distillation": functools.partial(objectives.FrameDistillation, weight=1.0),
    "utterance_distillation": functools.partial(objectives.UtteranceDistillation, weight=1.0),
    "local_attributes": functools.partial(objectives.LocalAttributePrediction, weight=1.0, size=8),
}


def options(**changes):
    """What `hparams/base/adapter.yaml` holds, for small sizes."""
    return {
        "pretrainings": {
            "paper": OBJECTIVES,
            "speaker_centred": {
                "utterances": functools.partial(objectives.UtteranceStatistics, components=3, prosody_components=2)
            },
            "multi_layer": {"layers": functools.partial(objectives.LayerPrediction, layers=[1, 2])},
        },
        "network": functools.partial(WAPTransformer, n_layers=2, n_heads=2, dropout=0.1),
        "number_of_steps": 18,
        "frames_per_batch": 60,
        "learning_rate": 0.003,
        "opt_class": functools.partial(torch.optim.AdamW, lr=0.003),
        "warmup": 0.1,
        "pretraining_dropout": 0.1,
        "mask_share": 0.5,
        "mask_width": 2,
        "ema_start": 0.9,
        "ema_end": 0.99,
        **changes,
    }


@pytest.fixture
def speech(filled_store, tmp_path):
    """Stored frames and the one manifest there is of them, which has no labels."""
    classes = {f"t-{speaker}{number}": number % 4 for speaker in "abc" for number in range(10)}
    rows = {key: {"wav": f"{key}.wav", "length": 1.0, "speaker": key[2]} for key in classes}
    atomic_write(tmp_path / "corpus.json", json.dumps({"data_root": str(tmp_path)}))
    atomic_write(tmp_path / "train_unlabelled.json", json.dumps(rows))
    return [tmp_path / "train_unlabelled.json"], StoredFrames(filled_store(classes), layer=2)


def pretrain(speech, folder, name="paper", prosody=dict, **changes):
    return RECIPE.pretrain(name, options(**changes), *speech, folder, 1, prosody)


def weights(folder):
    return (folder / "adapter.safetensors").read_bytes()


class Killed(Exception):
    """In the place of a kill."""


def kill_at_epoch(monkeypatch, number):
    original = brains.AdapterBrain.on_stage_start

    def start(self, stage, epoch=None):
        if epoch == number:
            raise Killed
        original(self, stage, epoch)

    monkeypatch.setattr(brains.AdapterBrain, "on_stage_start", start)


def test_a_killed_run_ends_with_the_weights_codebook_and_curves_of_an_unbroken_one(speech, tmp_path, monkeypatch):
    whole = pretrain(speech, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at_epoch(patch, 4)
        with pytest.raises(Killed):
            pretrain(speech, tmp_path / "broken")
    assert not (tmp_path / "broken" / "adapter").exists()
    resumed = pretrain(speech, tmp_path / "broken")
    assert weights(resumed) == weights(whole)
    told = [json.loads((folder / "about.json").read_text())["last_epoch"] for folder in (whole, resumed)]
    assert told[0] == told[1] and told[0]["codes_used"] > 1


def test_training_moves_the_adapter_lowers_the_loss_and_logs_every_epoch(speech, tmp_path):
    folder = pretrain(speech, tmp_path / "out", number_of_steps=60)
    lines = (tmp_path / "out" / "train_log.txt").read_text().splitlines()
    about = json.loads((folder / "about.json").read_text())
    losses = [float(line.split("train loss: ")[1].split(",")[0]) for line in lines]
    assert len(lines) == about["epochs"] and losses[-1] < losses[0]
    for name in ("codebook_perplexity", "codes_used", "layer_2", "mask_prediction", "learning_rate"):
        assert f"train {name}: " in lines[-1]
    assert {"codebook.png", "layer_weights.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_pretraining_reads_no_label_and_refuses_a_manifest_that_has_some(speech, tmp_path):
    manifests, front = speech
    # The folder holds nothing but the manifest without labels: there is none to be read.
    assert [path.name for path in tmp_path.glob("t*.json")] == ["train_unlabelled.json"]
    dataset = RECIPE.dataio_prepare(manifests, front, {}, [])
    assert sorted(dataset[0]) == ["feats", "id"]
    assert {key for row in dataset.data.values() for key in row} == {"wav"}
    rows = json.loads(manifests[0].read_text())
    atomic_write(tmp_path / "train.json", json.dumps({key: {**row, "emo": "sad"} for key, row in rows.items()}))
    with pytest.raises(UserError, match="comes with a label"):
        RECIPE.dataio_prepare([tmp_path / "train.json"], front, {}, [])


def test_the_adapter_standardises_by_the_frames_it_is_trained_on(speech, tmp_path):
    manifests, front = speech
    frames = torch.cat([front.read(key, "").float() for key in json.loads(manifests[0].read_text())])
    adapter = load_adapter(pretrain(speech, tmp_path / "out"))
    torch.testing.assert_close(adapter.centre, frames.mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(adapter.spread, frames.std(0, correction=0), atol=2e-3, rtol=2e-3)


def test_targets_of_whole_utterances_and_of_several_layers_can_be_trained_towards(speech, tmp_path):
    def prosody():
        return {key: torch.randn(5) for key in json.loads(speech[0][0].read_text())}

    for name in ("speaker_centred", "multi_layer"):
        folder = pretrain(speech, tmp_path / name, name, prosody)
        assert json.loads((folder / "about.json").read_text())["last_epoch"]["loss"] > 0


def test_a_folder_of_another_pretraining_is_refused_and_an_equal_one_is_not_trained_again(speech, tmp_path):
    folder = pretrain(speech, tmp_path / "out")
    stamp = (folder / "about.json").stat().st_mtime_ns
    assert pretrain(speech, tmp_path / "out") == folder and (folder / "about.json").stat().st_mtime_ns == stamp
    with pytest.raises(SettingsError, match=r"mask_share: 0\.5 -> 0\.7"):
        pretrain(speech, tmp_path / "out", mask_share=0.7)


def test_batches_hold_every_utterance_once_differ_by_epoch_and_waste_little():
    lengths = [5 + number % 40 for number in range(203)]
    batches = brains.LengthBatches(lengths, frames_per_batch=400, seed=1)
    orders = []
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        found = list(batches)
        assert sorted(place for batch in found for place in batch) == list(range(203))
        assert len(found) == len(batches) == 13
        orders.append(found)
    assert orders[0] != orders[1]
    true = [sum(lengths[place] for place in batch) for batch in orders[0]]
    padded = [len(batch) * max(lengths[place] for place in batch) for batch in orders[0]]
    assert min(true) > 330 and max(true) < 430 and sum(true) / sum(padded) > 0.85


# Files


def test_an_adapter_loads_through_a_pretrainer_in_a_recipe_of_its_own(tmp_path):
    adapter = wap().eval()
    export_adapter(tmp_path, adapter, {"dim": D, "layer": 2}, {})
    with (tmp_path / "hyperparams.yaml").open() as file:
        hparams = load_hyperpyyaml(file, {"adapter_folder": str(tmp_path)})
    hparams["pretrainer"].collect_files()
    hparams["pretrainer"].load_collected()
    frames = torch.randn(2, 5, D)
    torch.testing.assert_close(hparams["adapter"].eval()(frames), adapter(frames), atol=5e-3, rtol=5e-3)


@pytest.fixture
def pretrained(speech, tmp_path):
    """A pretrained adapter and labelled manifests of the speech that it was trained on."""
    folder = pretrain(speech, tmp_path / "pretraining")
    rows = json.loads(speech[0][0].read_text())
    for split, speakers in (("train", "ab"), ("valid", "c")):
        labelled = {key: {**row, "emo": LABELS[int(key[3]) % 4]} for key, row in rows.items() if key[2] in speakers}
        atomic_write(tmp_path / f"{split}.json", json.dumps(labelled))
    return folder


def classifier_options(folder, **changes):
    """What `hparams/base/classifier.yaml` makes of a small run."""
    filled = {"name": "toy", "seed": 1, "labels": list(LABELS), "output_folder": str(folder / "classifier")}
    filled |= {f"{split}_manifest": str(folder / f"{split}.json") for split in ("train", "valid")}
    filled |= {"encoder": "toy", "layer": 2, "trim_db": 40.0, "number_of_epochs": 4, "batch_size": 8, **changes}
    with (HPARAMS / "base" / "classifier.yaml").open() as file:
        return load_hyperpyyaml(file, filled)


def test_a_pretrained_adapter_is_the_front_of_a_classifier_and_of_the_student_that_adapts_it(
    speech, pretrained, tmp_path
):
    front = speech[1]
    start = CLASSIFIER.make_classifier(classifier_options(tmp_path, adapter=str(pretrained)), front)
    expected = load_adapter(pretrained).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in start.adapter.state_dict().items())
    recogniser = CLASSIFIER.train_classifier(classifier_options(tmp_path, adapter=str(pretrained)), front)
    student = load_classifier(recogniser, LABELS, front.fingerprint)
    moved = [name for name, value in student.adapter.state_dict().items() if not torch.equal(value, expected[name])]
    assert "layers.0.linear1.weight" in moved and "centre" not in moved
    assert student.eval().stochastic_logits(torch.randn(3, 5, D), torch.ones(3), passes=4).shape == (3, 4, 4)
    assert "adapter: {" in (recogniser / "hyperparams.yaml").read_text()


def test_a_classifier_trained_without_an_adapter_is_not_taken_for_one_with_it(speech, pretrained, tmp_path):
    CLASSIFIER.train_classifier(classifier_options(tmp_path), speech[1])
    with pytest.raises(SettingsError, match="the adapter changed"):
        CLASSIFIER.train_classifier(classifier_options(tmp_path, adapter=str(pretrained)), speech[1])
    with pytest.raises(AdapterError, match="layer: found 2, wanted 1"):
        CLASSIFIER.make_classifier(classifier_options(tmp_path, adapter=str(pretrained), layer=1), speech[1])


def test_an_adapter_of_other_frames_and_one_that_is_not_whole_are_clear_errors(tmp_path):
    export_adapter(tmp_path, wap(), {"dim": D, "layer": 2, "encoder": "a"}, {})
    with pytest.raises(AdapterError, match="encoder: found a, wanted b"):
        load_adapter(tmp_path, {"dim": D, "layer": 2, "encoder": "b"})
    (tmp_path / "adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="cannot be loaded"):
        load_adapter(tmp_path)
    (tmp_path / "about.json").unlink()
    with pytest.raises(AdapterError, match="no whole adapter there"):
        load_adapter(tmp_path)


# Folds, labels, tables


def test_folds_name_speakers_and_each_is_tested_once(toy_folder, tmp_path, no_corpora):
    folds = [["01", "03"], ["02"], ["04", "05"]]
    prepare_folds(prepare_ravdess_8, toy_folder, tmp_path, folds)
    for number, speakers in enumerate(folds, start=1):
        about = json.loads((tmp_path / f"fold_{number}" / "corpus.json").read_text())
        assert about["speakers"] == fold_splits(folds, number) and about["speakers"]["test"] == speakers
    with pytest.raises(CorpusError, match="speaker 17 is unknown"):
        prepare_folds(prepare_ravdess_8, toy_folder, tmp_path, [["01"], ["17"]])
    with pytest.raises(CorpusError, match="no group in two"):
        fold_splits([["01"], ["01"]], 1)


@pytest.mark.parametrize("chosen", [["train", "test"], "test", "all"])
def test_records_call_it_a_leak_however_the_test_fold_is_asked_for(chosen):
    assert pretraining_audio(chosen).startswith("LEAK")
    assert pretraining_audio(["train"]) == "the training folds' audio"


def test_few_labels_are_as_many_of_each_class_and_follow_from_the_seed_alone():
    rows = {f"t-{number}": {"label": number % 3} for number in range(30)}
    backwards = dict(reversed(rows.items()))
    chosen = few_labels(rows, 4, seed=1)
    assert chosen == few_labels(backwards, 4, seed=1) != few_labels(rows, 4, seed=2)
    assert [sum(rows[key]["label"] == label for key in chosen) for label in range(3)] == [4, 4, 4]
    assert few_labels(rows, 99, 1) == few_labels(rows, "all", 1) == sorted(rows)
    for wrong in (0, "some"):
        with pytest.raises(UserError, match="--labels_per_class"):
            few_labels(rows, wrong, 1)


def record(arm, fold, seed, hits, speaker):
    counts = [[hits, 4 - hits, 0], [0, 4, 0]]
    told = {
        "corpus": "toy",
        "labels_per_class": "all",
        "steps": 5,
        "UA": (hits / 4 + 1) / 2,
        "WA": 0.5,
        "macro_F1": 0.5,
    }
    return {"arm": arm, "fold": fold, "seed": seed, "by_speaker": {speaker: counts}, **told}


def test_the_table_pools_the_folds_and_pairs_the_differences():
    better = {"scratch": 0, "pretrained": 2}
    records = [
        record(arm, fold, seed, gain + fold % 2, f"s{fold}")
        for arm, gain in better.items()
        for fold in (1, 2, 3)
        for seed in (1, 2)
    ]
    rows = arm_table(records, ["scratch", "pretrained"], ["scratch"]).rows
    # 2 of 12 and 8 of 12 right in the first class, all in the second.
    assert [row[3] for row in rows] == ["58.3 ± 0.0", "83.3 ± 0.0"]
    assert rows[1][-1] == "+25.0 (+25.0 to +25.0)" and rows[1][5] == "83.3"
    with pytest.raises(UserError, match="no result of arm scratch, seed 1, fold 1"):
        pooled_counts(records[1:], list(better))
    with pytest.raises(UserError, match="other settings"):
        pooled_counts([*records[1:], {**records[0], "finetuning_steps": 6}], list(better))


def test_prosody_of_a_recording_is_finite_however_short_and_tells_pitch():
    reader, time = ProsodyReader(trim_db=None), torch.arange(8000) / 16000
    low, high = (reader.encode(0.3 * torch.sin(2 * math.pi * pitch * time))[0, 0] for pitch in (110.0, 150.0))
    # The first functional is the mean of log f0.
    assert high[0] - low[0] == pytest.approx(math.log(150 / 110), abs=0.05)
    assert torch.isfinite(reader.encode(torch.zeros(10))).all()


def test_settings_of_an_arm_name_functions_inside_functions():
    made = functools.partial(objectives.UtteranceStatistics, centre=objectives.speaker_centred)
    assert described("x", made)["x.centre"].endswith("speaker_centred")
    assert copy.deepcopy(described("x", made)) == json.loads(json.dumps(described("x", made)))
