"""Every training recipe in two processes, as `torchrun --nproc_per_node=2` starts them (gloo), and in one."""

import json
import os
from pathlib import Path

import processes
import pytest
import torch
from local_servers import free_port
from safetensors.torch import load_file
from tiny_text_encoder import write_text_encoder
from toy_corpora import write_hubert

ROOT = Path(__file__).parents[2]
# An odd batch cannot be dealt evenly.
QUICK = "{number_of_epochs: 6, batch_size: 11, learning_rate: 0.005}"
# Where an encoder is trained along, an epoch takes seconds.
SHORT = QUICK.replace("6", "2", 1)
SCRIPT = "recipes/RAVDESS/mifuse/train.py"
METHODS = ["shot", "nrc", "dine", "prode", "mi_fuse", "mi_fuse_permuted", "mi_fuse_plus", "oracle"]
UNTRAINED = ["source_only", "lalm_zero_shot", "zero_training"]
FOLDS = {"folds": "[['03', '08', '10'], ['09', '11']]", "labels": "[angry, happy, neutral, sad]"}
ENCODER = {"encoder_layers": "[0, 1]", "layer": 1}
# What is dropped before the pooling is drawn by each process for itself.
TINY = "{adapter_dropout: 0.0, n_layers: 2, codes: 16, frames_per_batch: 100, mask_width: 2, finetuning_batch_size: 11}"


@pytest.fixture(scope="module")
def world(toy_folder, toy_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write_text_encoder(folder / "text")
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    write_hubert(folder / "hubert", **still, layerdrop=0.0, apply_spec_augment=False)
    write_hubert(folder / "noisy_hubert", layerdrop=0.5)
    return folder, {"data_folder": toy_folder, "encoder": toy_encoder}


def trained(world, name, script, hparams, count, killed_at=None, output=None, **flags):
    """Run a recipe in `count` processes, of which the first may be killed; give its output folder."""
    folder, given = world
    output = output or folder / f"{name}{count}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
    environment = {**kept, "MIFUSE_CACHE": str(folder / f"cache_{name}{count}"), "HF_HUB_OFFLINE": "1"}
    given = {**given, **flags, "output_folder": output, "device": "cpu"}
    if count > 1:
        given["distributed_backend"] = "gloo"
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    words = [hparams, *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        log = f"{output}_{rank}.log"
        arguments = (script, words, str(ROOT), {**environment, **own}, log, killed_at if rank == 0 else None)
        started.append((processes.start(processes.run_script, *arguments), log))
    for process, log in started:
        process.join(300)
        if killed_at is not None:
            assert process.exitcode not in (0, None)
            continue
        said = "".join(Path(f"{log}.{end}").read_text() for end in ("out", "err"))
        if process.exitcode != 0:
            for other, _ in started:
                other.kill()
        assert process.exitcode == 0, said
    return output


def numbers(told):
    """Every number of a JSON document, in its order."""
    if isinstance(told, dict):
        told = [told[key] for key in sorted(told)]
    if isinstance(told, list):
        return [number for part in told for number in numbers(part)]
    return [told] if isinstance(told, int | float) else []


def compare(one, two, least):
    """Every prediction of two output folders to within 1e-4, weights to within 1 % of their length, losses to 5 %.

    Adam makes steps of full size out of rounding errors where a gradient is zero, as before a normalisation: such
    weights differ, and do not matter.
    """
    names = {folder: {path.relative_to(folder) for path in folder.rglob("*.safetensors")} for folder in (one, two)}
    assert names[one] == names[two] and len(names[one]) >= least
    for name in names[one]:
        wanted, found = load_file(one / name), load_file(two / name)
        assert wanted.keys() == found.keys()
        far = torch.stack([(found[key] - wanted[key]).double().norm() for key in wanted]).norm()
        assert far < 0.01 * torch.stack([value.double().norm() for value in wanted.values()]).norm(), name
    for path in one.rglob("validation.json"):
        wanted, found = json.loads(path.read_text()), json.loads((two / path.relative_to(one)).read_text())
        assert numbers(found) == pytest.approx(numbers(wanted), rel=0.05, abs=1e-3) and len(numbers(wanted)) > 2
    for path in one.rglob("predictions.json"):
        wanted, found = json.loads(path.read_text()), json.loads((two / path.relative_to(one)).read_text())
        assert wanted.keys() == found.keys() and len(wanted) > 0
        for key in wanted:
            assert found[key] == pytest.approx(wanted[key], abs=1e-4)


def both(world, name, script, hparams, least, **flags):
    runs = [trained(world, name, script, hparams, count, **flags) for count in (1, 2)]
    compare(*runs, least)
    return runs


def test_classifier(world):
    flags = {"source_classifier": QUICK, **ENCODER}
    both(world, "classifier", "recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml", 1, **flags)


@pytest.mark.parametrize("methods", [["shot", "mi_fuse_plus"], pytest.param(METHODS, marks=pytest.mark.long)])
def test_adaptation(world, methods):
    flags = {"source_classifier": QUICK, "teacher_classifier": QUICK, "encoder_layers": "[0, 1]", "layer": 0}
    flags |= {"teacher_layer": 1, "number_of_steps": 12, "batch_size": 11, "learning_rate": 0.003}
    flags["method"] = f"[{', '.join(methods + UNTRAINED)}]"
    one, two = both(world, f"mifuse{len(methods)}", SCRIPT, "hparams/nemo2rav.yaml", len(methods), **flags)
    tables = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert [record["UA"] for record in tables[0]] == [record["UA"] for record in tables[1]]
    # What was paid for was asked once, by one process.
    assert ["serving" in Path(f"{two}_{rank}.log.out").read_text() for rank in (0, 1)] == [True, False]


@pytest.mark.long
def test_arms_with_a_pretrained_adapter(world):
    flags = {
        "adapter": TINY,
        "number_of_steps": 6,
        "finetuning_steps": 8,
        "seeds": "[1]",
        "fold": 1,
        **FOLDS,
        **ENCODER,
    }
    flags |= {"arm": "[mean_linear, sap_linear, scratch, pretrained]", "d_model": 16, "n_heads": 2, "frame_average": 1}
    flags["labels_per_class"] = "[all]"
    both(world, "adapter", "recipes/EmoDB/adapter/train.py", "hparams/adapter_emodb.yaml", 1, **flags)


@pytest.mark.long
def test_dual_encoder(world):
    flags = {"text_encoder": world[0] / "text", "number_of_epochs": 3, "batch_size": 11, "frame_average": 1, **ENCODER}
    both(world, "dual", "recipes/EmoDB/dual_encoder/train.py", "hparams/dual_encoder_emodb.yaml", 1, **flags)


@pytest.mark.long
def test_late_fusion(world):
    inner = {"encoder": world[1]["encoder"], **ENCODER, "text_encoder": world[0] / "text", "frame_average": 1}
    inner |= {"number_of_epochs": 3, "batch_size": 11}
    flags = {"arm": "[fm_only, zs_fuse, zs_fuse_permuted, source_classifier_fused]", "fold": 1, "seeds": "[1]", **FOLDS}
    flags |= {"dual_encoder_flags": json.dumps([[key, str(value)] for key, value in inner.items()]), **ENCODER}
    flags |= {"labels_per_class": "[all]", "frame_average": 1, "finetuning_steps": 8, "audio_repeats": "[1]"}
    both(world, "zsfuse", "recipes/EmoDB/zsfuse/train.py", "hparams/zsfuse_emodb.yaml", 2, **flags)


def test_an_encoder_that_is_trained_along(world):
    flags = {"source_classifier": SHORT, "features": "finetune", "encoder": world[0] / "hubert"}
    both(world, "finetune", "recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml", 2, **flags)


def test_processes_stay_alike_when_each_drops_other_layers(world):
    flags = {"source_classifier": SHORT, "features": "finetune", "encoder": world[0] / "noisy_hubert"}
    script, hparams = "recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml"
    assert json.loads(next(trained(world, "noisy", script, hparams, 2, **flags).rglob("validation.json")).read_text())


def test_a_run_that_was_killed_in_two_processes_goes_on_in_one(world):
    given = ("recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml")
    flags = {"source_classifier": QUICK.replace("6", "40", 1), **ENCODER}
    whole = trained(world, "whole", *given, 1, **flags)
    second_checkpoint = ("speechbrain.utils.checkpoints", "Checkpointer.save_checkpoint", 2)
    broken = trained(world, "broken", *given, 2, killed_at=second_checkpoint, **flags)
    trained(world, "broken", *given, 1, output=broken, **flags)
    assert "going on after epoch" in Path(f"{broken}_0.log.out").read_text()
    compare(whole, broken, 1)
