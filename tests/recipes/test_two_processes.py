"""The classifier recipe with its encoder in two processes, as `torchrun --nproc_per_node=2` starts them (gloo)."""

import json
import os
import re
from pathlib import Path

import processes
import pytest
import torch
from local_servers import free_port
from safetensors.torch import load_file
from toy_corpora import write_hubert

ROOT = Path(__file__).parents[2]
FINETUNE = ("recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml")
# An epoch takes seconds. Each process normalises over its half of a batch, so a batch must not be small.
SHORT = "{number_of_epochs: 3, batch_size: 40, learning_rate: 0.002, dropout: 0.0, log_interval: 1}"
STILL = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)


@pytest.fixture(scope="module")
def world(toy_folder, toy_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write_hubert(folder / "hubert", **STILL, layerdrop=0.0, apply_spec_augment=False)
    write_hubert(folder / "noisy_hubert", layerdrop=0.5)
    return folder, {"data_folder": toy_folder, "encoder": toy_encoder}


def begun(world, name, script, hparams, rank=None, count=2, port=0, killed_at=None, **flags):
    """Start one process of a recipe; give it with the path of its log."""
    folder, given = world
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "MIFUSE_"))}
    environment = {**kept, "MIFUSE_CACHE": str(folder / f"cache_{name}"), "HF_HUB_OFFLINE": "1"}
    given = {**given, "output_folder": folder / name, "device": "cpu", **flags}
    if rank is not None:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    words = [hparams, *(text for key, value in given.items() for text in (f"--{key}", str(value)))]
    log = folder / f"{name}_{rank or 0}"
    return processes.start(processes.run_script, script, words, str(ROOT), environment, str(log), killed_at), log


def said_by(log):
    return "".join(Path(f"{log}.{end}").read_text() for end in ("out", "err"))


def ended(process, log, status=0):
    process.join(300)
    assert process.exitcode == status, said_by(log)
    return said_by(log)


def finetuned(world, name, count, encoder="hubert", killed_at=None):
    """Train an encoder with its classifier in `count` processes, of which the first may be killed."""
    flags = {"features": "finetune", "encoder": world[0] / encoder, "source_classifier": SHORT}
    if count == 1:
        ended(*begun(world, name, *FINETUNE, **flags))
        return world[0] / name
    flags |= {"port": free_port(), "distributed_backend": "gloo"}
    kills = [killed_at, None]
    both = [begun(world, name, *FINETUNE, rank=rank, killed_at=kills[rank], **flags) for rank in (0, 1)]
    for process, log in both:
        if killed_at is None:
            ended(process, log)
            continue
        process.join(300)
        assert process.exitcode not in (0, None), said_by(log)
    return world[0] / name


def losses(output):
    """Training losses by epoch."""
    (log,) = output.rglob("train_log.txt")
    return [float(value) for value in re.findall(r"train loss: ([-.\de+]+)", log.read_text())]


def validation(output):
    return json.loads(next(output.rglob("validation.json")).read_text())


@pytest.fixture(scope="module")
def one(world):
    return finetuned(world, "one", 1)


def test_two_processes_train_an_encoder_to_the_loss_of_one(world, one):
    two = finetuned(world, "two", 2)
    assert len(losses(one)) == 3 and losses(one)[-1] < losses(one)[0]
    assert losses(two) == pytest.approx(losses(one), rel=0.05)
    assert validation(two)["nll"] == pytest.approx(validation(one)["nll"], rel=0.05)
    assert validation(two)["n"] == validation(one)["n"]
    names = [{path.relative_to(folder) for path in folder.rglob("*.safetensors")} for folder in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 2
    for name in names[0]:
        wanted, found = load_file(one / name), load_file(two / name)
        assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}


def test_processes_stay_alike_when_each_drops_other_layers(world):
    assert validation(finetuned(world, "noisy", 2, "noisy_hubert"))["n"] > 0


def test_a_run_that_was_killed_in_two_processes_goes_on_in_one(world, one):
    third_checkpoint = ("speechbrain.utils.checkpoints", "Checkpointer.save_checkpoint", 3)
    broken = finetuned(world, "broken", 2, killed_at=third_checkpoint)
    assert len(losses(broken)) == 3 and not list(broken.rglob("validation.json"))
    finetuned(world, "broken", 1)
    assert "going on after epoch 2 of 3" in said_by(world[0] / "broken_0")
    assert losses(broken)[-1] == pytest.approx(losses(one)[-1], rel=0.05)


def test_one_process_of_torchrun_trains_as_python_does(world, one):
    output = world[0] / "torchrun"
    given = {"features": "finetune", "encoder": world[0] / "hubert", "source_classifier": SHORT}
    port = free_port()
    ended(*begun(world, "torchrun", *FINETUNE, rank=0, count=1, port=port, distributed_backend="gloo", **given))
    for path in one.rglob("*.safetensors"):
        wanted, found = load_file(path), load_file(output / path.relative_to(one))
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize(
    ("script", "hparams"),
    [
        ("recipes/EmoDB/classifier/train.py", "hparams/classifier_emodb.yaml"),
        ("recipes/RAVDESS/mifuse/train.py", "hparams/nemo2rav.yaml"),
        ("recipes/EmoDB/adapter/pretrain.py", "hparams/adapter_emodb.yaml"),
        ("recipes/EmoDB/adapter/train.py", "hparams/adapter_emodb.yaml"),
        ("recipes/EmoDB/dual_encoder/train.py", "hparams/dual_encoder_emodb.yaml"),
        ("recipes/EmoDB/zsfuse/train.py", "hparams/zsfuse_emodb.yaml"),
    ],
)
def test_a_recipe_on_stored_frames_refuses_several_processes_at_once_and_says_what_to_do(script, hparams, world):
    name = script.replace("/", "_")
    said = ended(*begun(world, name, script, hparams, rank=1), status=2)
    assert re.search(r"error: torchrun started 2 processes, .* Start it with python\. .*sweep.*extract", said)
    assert said.count("error:") == 1 and "Traceback" not in said and not (world[0] / name).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--distributed_backend nccl: .* pass --distributed_backend gloo --device cpu"),
        ({"distributed_backend": "gloo", "source_classifier": "{batch_size: 3}"}, "--batch_size 3: .* multiple of 2"),
    ],
)
def test_processes_that_cannot_share_the_work_end_with_one_error(flags, message, world):
    name, port = f"refused{len(flags)}", free_port()
    given = {"features": "finetune", "encoder": world[0] / "hubert", "port": port, **flags}
    for process, log in [begun(world, name, *FINETUNE, rank=rank, **given) for rank in (0, 1)]:
        said = ended(process, log, status=2)
        assert re.search(f"error: {message}", said) and "Traceback" not in said
