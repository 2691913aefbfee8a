"""What a run does when it is stopped, started twice, resumed on other data or out of disk; and publishing any of its steps."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lock_holder import elsewhere
from processes import carry_out, job
from safetensors.torch import load_file, save_file
from tiny_runs import autoencoder_config, autoencoder_tree, diffusion_config, diffusion_tree, tree, write_stripes, write_yaml

import latentdiff
from latentdiff.errors import UserError
from latentdiff.training import autoencoder_checkpoint, state, train, trainer
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training.run_clock import Due
from latentdiff.utils import locks, signals

OFTEN = {"train__steps": 4, "train__save_minutes": 1e-9, "train__keep": 10}


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def run_1(tmp_path_factory, stripe_folder):
    """A finished run of stage 1 with all its states."""
    output = tmp_path_factory.mktemp("durable") / "stage1"
    train(autoencoder_config(stripe_folder, output, **OFTEN))
    return output


@pytest.fixture(scope="module")
def run_2(tmp_path_factory, stripe_folder, run_1):
    """A finished run of stage 2 with its states 3 and 4 and snapshots of 2 and 4."""
    output = tmp_path_factory.mktemp("durable") / "stage2"
    changes = {**OFTEN, "train__keep": 2, "train__snapshot_every": 2}
    train(diffusion_config(stripe_folder, output, run_1, **changes))
    return output


def copy(source, target):
    shutil.copytree(source, target)
    return target


# Starting and going on


def test_two_runs_do_not_share_an_output(tmp_path, stripe_folder, refused):
    config = write_yaml(tmp_path / "run.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", **OFTEN))
    child = elsewhere(tmp_path / "run")
    try:
        for resume in ([], ["--resume"]):
            said = refused("train", config, *resume)
            assert f"{tmp_path / 'run'}: is in use by another run (process {child.pid} on " in said
    finally:
        child.kill()
        child.wait()
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=1))
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_stopped_during_its_first_save_starts_and_resumes(tmp_path, stripe_folder, run_1, resume, capsys):
    output = tmp_path / "run"
    for folder in (output / "state" / ".step-1.tmp", output / "state" / ".step-1.old-0123abcd.tmp"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    shutil.copy(run_1 / "run.json", output)
    (output / "metrics.jsonl").write_text('{"step": 1, "lr": 1}\n{"st')
    train(autoencoder_config(stripe_folder, output, **OFTEN), resume)
    assert ("no state was saved yet; the run starts from its beginning" in capsys.readouterr().err) == resume
    assert (output / "metrics.jsonl").read_bytes() == (run_1 / "metrics.jsonl").read_bytes()
    names = {str(path.relative_to(output)) for path in tree(output) if "logs" not in path.parts}
    assert names == {str(path.relative_to(run_1)) for path in tree(run_1) if "logs" not in path.parts}


def test_a_run_is_said_to_be_there_only_where_there_is_one(tmp_path, stripe_folder, run_1):
    output = copy(run_1, tmp_path / "run")
    config = autoencoder_config(stripe_folder, output, **OFTEN)
    before = tree(output)
    assert "holds a training run already; continue it with --resume" in refusal(lambda: train(config))
    for folder in state.state_folders(output):
        (folder / "model.safetensors").write_bytes(b"short")
    said = refusal(lambda: train(config))
    assert "training states that are all damaged, such as step-4" in said and f"delete {output / 'state'}" in said
    shutil.rmtree(output / "state")
    assert f"{output / 'autoencoder'}: is a finished model already" in refusal(lambda: train(config))
    assert "no training state to resume from" in refusal(lambda: train(config, True))
    assert tree(output) == {path: content for path, content in before.items() if "state" not in path.parts}
    shutil.rmtree(output / "autoencoder")
    train(config)
    assert tree(output / "autoencoder").keys() == {path for path in before if path.is_relative_to(output / "autoencoder")}


def test_other_images_are_refused_on_resume_and_named(tmp_path, run_1):
    images = write_stripes(tmp_path / "data")
    output = tmp_path / "run"
    train(autoencoder_config(images, output, **OFTEN))
    longer = autoencoder_config(images, output, **{**OFTEN, "train__steps": 5})
    old = {path: path.read_bytes() for path in images.rglob("*.png")}
    before = tree(output)
    some = sorted(old)[::4]
    for change in ("inverted", "deleted"):
        for path in some:
            path.write_bytes(old[sorted(old)[1]]) if change == "inverted" else path.unlink()
        said = refusal(lambda: train(longer, True))
        assert f"{output / 'state'}: this run was trained on other images (" in said and "put the old ones back" in said
        for path in some:
            path.write_bytes(old[path])
    assert tree(output).items() >= {k: v for k, v in before.items() if "logs" not in k.parts}.items()
    train(longer, True)
    assert state.load_state(output)[1]["step"] == 5


def test_another_normaliser_is_refused_on_resume(tmp_path, stripe_folder, run_1, run_2):
    output, first = copy(run_2, tmp_path / "run"), copy(run_1, tmp_path / "first")
    config = diffusion_config(stripe_folder, output, first, **{**OFTEN, "train__steps": 5, "train__keep": 2})
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "autoencoder": str(first)}))
    file = first / "autoencoder" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "latents_std": [1.1, 1.0]}))
    said = refusal(lambda: train(config, True))
    assert f"{output / 'state'}: this run was trained on other latent normaliser; name the old autoencoder" in said
    file.write_text(json.dumps({**settings, "latents_std": [1.000001, 1.0]}))  # summed up in another order
    train(config, True)
    assert state.load_state(output)[1]["step"] == 5


def test_a_state_from_before_there_were_fingerprints_is_resumed_with_a_warning(tmp_path, stripe_folder, run_1, capsys):
    output = copy(run_1, tmp_path / "run")
    file = output / "state" / "step-4" / "state.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in meta.items() if key not in ("made_of", "sha256")}))
    train(autoencoder_config(stripe_folder, output, **{**OFTEN, "train__steps": 5}), True)
    assert "is of a version that did not note its images; they are not compared" in capsys.readouterr().err
    assert set(state.load_state(output)[1]["made_of"]) == {"data"}


def test_a_damaged_state_file_is_named(tmp_path, stripe_folder, run_1, capsys):
    output = copy(run_1, tmp_path / "run")
    config = autoencoder_config(stripe_folder, output, **{**OFTEN, "train__steps": 5})
    file = output / "state" / "step-4" / "state.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "ema_updates": 5}))  # JSON still, and wrong
    train(config, True)
    assert f"{file.parent}: damaged training state (state.json: its content has changed)" in capsys.readouterr().err
    shutil.rmtree(output)
    output = copy(run_1, output)
    file.write_text(json.dumps({key: value for key, value in meta.items() if key not in ("ema_updates", "sha256")}))
    assert "damaged training state ('ema_updates' is missing)" in refusal(lambda: train(config, True))


def test_metrics_that_are_no_text_do_not_stop_a_run(tmp_path, stripe_folder, run_1, curves):
    output = copy(run_1, tmp_path / "run")
    with (output / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 2}\n')
    train(autoencoder_config(stripe_folder, output, **{**OFTEN, "train__steps": 5}), True)
    assert curves(output)["step"] == [1, 2, 3, 4, 5]


def test_a_config_is_utf_8_in_any_locale(tmp_path):
    file = write_yaml(tmp_path / "run.yaml", {"stage": "autoencoder"})
    file.write_bytes("stage: autoencoder\noutput: Läufe/é\ndata: {source: x}\nmodel: {}\ntrain: {steps: 1}\n".encode())
    code = f"from latentdiff.config import load_config\nprint(ascii(load_config({str(file)!r}).output))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "'L\\xe4ufe/\\xe9'\n", done.stderr


def test_a_run_leaves_the_process_as_it_was(tmp_path, stripe_folder):
    torch.set_num_threads(1)
    torch.manual_seed(17)
    expected = torch.rand(3)
    torch.manual_seed(17)
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=1, train__threads=2))
    assert torch.get_num_threads() == 1 and torch.equal(torch.rand(3), expected)


def test_a_full_disk_leaves_the_finished_autoencoder_whole(tmp_path, stripe_folder, run_1, monkeypatch):
    output = copy(run_1, tmp_path / "run")
    before = tree(output / "autoencoder")
    config = autoencoder_config(stripe_folder, output, **{**OFTEN, "train__steps": 5})
    with monkeypatch.context() as patch:
        patch.setattr(
            autoencoder_checkpoint, "write_hashes", lambda folder: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        said = refusal(lambda: train(config, True))
    assert said == f"{output / 'autoencoder'}: cannot be written (No space left)"
    assert tree(output / "autoencoder") == before and not list(output.glob(".*"))
    train(config, True)
    assert json.loads((output / "autoencoder" / "latentdiff.json").read_text())["steps"] == 5


# Signals


@pytest.fixture
def sending(monkeypatch):
    """sending(name, module, function): the signal comes when that function is called."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send(name, module, function):
        real = getattr(module, function)
        sent = []

        def called(*arguments, **keywords):
            if not sent:
                sent.append(name)
                signal.raise_signal(getattr(signal, name))
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, function, called)

    yield send
    signal.signal(signal.SIGINT, before)


ENDINGS = (signals.Stopped, signals.Interrupted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_step_leaves_nothing_and_says_how_to_start(tmp_path, stripe_folder, sending, name, capsys):
    sending(name, stage1, "AutoencoderTrainer")
    with pytest.raises(ENDINGS):
        train(autoencoder_config(stripe_folder, tmp_path / "run"))
    by = "Ctrl-C" if name == "SIGINT" else name
    line = f"latentdiff: stopped by {by}; no state was saved yet; start again with: train(config)\n"
    assert line in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_last_step_loses_nothing(tmp_path, stripe_folder, run_1, sending, name, capsys):
    sending(name, autoencoder_checkpoint, "_measure_latents")
    config = autoencoder_config(stripe_folder, tmp_path / "run", **OFTEN)
    with pytest.raises(ENDINGS):
        train(config)
    assert "the state of step 4 is saved; go on with: train(config, resume=True)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "autoencoder").exists()
    train(config, True)
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "run" / "autoencoder" / name).read_bytes() == (run_1 / "autoencoder" / name).read_bytes()


def test_a_signal_in_a_step_stops_after_it(tmp_path, stripe_folder, sending, capsys):
    sending("SIGINT", stage1.AutoencoderTrainer, "update")
    config = autoencoder_config(stripe_folder, tmp_path / "run", train__steps=100)
    with pytest.raises(signals.Interrupted):
        train(config)
    assert "the state of step 1 is saved" in capsys.readouterr().err and state.newest_step(tmp_path / "run") == 1


def test_processes_agree_on_the_signal():
    def answers(*sums):
        accelerator = SimpleNamespace(num_processes=2, is_main_process=False, device="cpu")
        accelerator.reduce = lambda numbers, how: torch.tensor(sums)
        return accelerator

    def agreed(accelerator, save):
        return trainer.agree(accelerator, save, watch, Due(0.9, last=True))

    watch = signals.Watch()
    # The sums over the processes: another signal, Ctrl-C, save; and what is due by the main process's clock
    nothing = Due()
    assert agreed(answers(0.0, 0.0, 0.0, *nothing), True) == (False, None, nothing)
    assert agreed(answers(0.0, 0.0, 1.0, *nothing), False) == (True, None, nothing)
    assert agreed(answers(1.0, 0.0, 0.0, *nothing), False) == (False, signal.SIGTERM, nothing)
    due = Due(0.25, last=True, snapshot=True)
    assert agreed(answers(0.0, 0.0, 0.0, *due), True) == (False, None, due)
    watch.received = [signal.SIGUSR1]
    assert agreed(answers(1.0, 0.0, 0.0, *nothing), False) == (False, signal.SIGUSR1, nothing)
    assert agreed(answers(1.0, 1.0, 0.0, *nothing), False) == (False, signal.SIGINT, nothing)  # Ctrl-C goes before others


@pytest.mark.slow
def test_several_processes_stop_alike(tmp_path, stripe_folder):
    settings = {"train__steps": 10**5, "train__save_minutes": 60.0}
    config = write_yaml(tmp_path / "run.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", **settings))
    once = str(tmp_path / "run" / "metrics.jsonl")
    (result,) = carry_out([job(config, 2, kill_after=0.2, once=once, signal="SIGINT")])
    assert result["codes"] == [130, 130], result["stderr"]
    assert "go on with: accelerate launch OPTIONS -m latentdiff train" in result["stderr"]
    assert len(state.state_folders(tmp_path / "run")) == 1 and not list((tmp_path / "run").glob(".*"))


# Publishing


def weights(folder) -> dict:
    files = {file.relative_to(folder): load_file(file) for file in folder.rglob("*.safetensors")}
    return {(name, key): value for name, tensors in files.items() for key, value in tensors.items()}


def same(first, second) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_step_of_stage_1_is_what_the_run_stopped_there_publishes(tmp_path, stripe_folder, run_1, run):
    train(autoencoder_config(stripe_folder, tmp_path / "short", **{**OFTEN, "train__steps": 2}))
    out = tmp_path / "out" / "two"
    assert run("publish", run_1, "--step", "2", "--out", out) == f"{out}\n"
    short = tmp_path / "short" / "autoencoder"
    assert same(out, short) and not same(out, run_1 / "autoencoder")
    assert (out / "config.json").read_bytes() == (short / "config.json").read_bytes()
    assert json.loads((out / "latentdiff.json").read_text())["steps"] == 2
    assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "short" / "report.json").read_bytes()


def test_a_step_of_stage_2_is_what_the_run_stopped_there_publishes(tmp_path, stripe_folder, run_1, run_2, run):
    for step in (2, 3):  # a snapshot, and a state
        config = diffusion_config(stripe_folder, tmp_path / f"short-{step}", run_1, **{**OFTEN, "train__steps": step})
        train(config)
        out = latentdiff.publish(run_2, step, out=tmp_path / f"out-{step}")
        assert same(out, tmp_path / f"short-{step}" / "model") and not same(out, run_2 / "model")
        meta, expected = (json.loads((folder / "latentdiff.json").read_text()) for folder in (out, model_of(config)))
        assert meta["steps"] == step and meta["ema"] == expected["ema"] and meta["latents"] == expected["latents"]
    assert run("generate", "--all-classes", "--model", out, "--num-images", "1") == "samples.png\n"


def test_an_earlier_step_is_the_weaker_network(tmp_path, run_1, run_2, run, refused):
    out = tmp_path / "out"
    assert run("publish", run_2, "--weak-step", "2", "--out", out) == f"{out}\n"
    early = latentdiff.publish(run_2, 2, out=tmp_path / "early")
    weights = "diffusion_pytorch_model.safetensors"
    assert (out / "weak" / weights).read_bytes() == (early / "unet" / weights).read_bytes()
    assert (out / "unet" / weights).read_bytes() == (run_2 / "model" / "unet" / weights).read_bytes()
    assert json.loads(run("info", out))["weak"]["steps_trained"] == 2 and "weak" not in json.loads(run("info", early))
    run("generate", "--all-classes", "--model", out, "--num-images", "1", "--weak", "--guidance", "2", "--steps", "2")
    assert "--weak-step 4: must be before step 4" in refused("publish", run_2, "--weak-step", "4")
    assert "--weak-step 1: " in (line := refused("publish", run_2, "--weak-step", "1")) and "holds the steps 2, 3, 4" in line
    assert "--weak-step: is for a run of stage diffusion" in refused("publish", run_1, "--weak-step", "1")


def model_of(config) -> Path:
    return Path(config.output) / "model"


def test_the_newest_state_takes_the_place_of_the_model(tmp_path, run_2):
    output = copy(run_2, tmp_path / "run")
    shutil.rmtree(output / "state" / "step-4")
    assert latentdiff.publish(output) == output / "model"
    assert json.loads((output / "model" / "latentdiff.json").read_text())["steps"] == 3
    assert not list(output.glob(".*"))
    again = latentdiff.publish(output, 2, out=tmp_path / "out")
    assert latentdiff.publish(output, 3, out=again) == again  # a folder that this run has published
    assert json.loads((again / "latentdiff.json").read_text())["steps"] == 3


def test_the_best_state_is_published(tmp_path, stripe_folder, run_1):
    best = {"train__best": "validation/loss_ema", "train__picture_every": 1, "train__keep": 1}
    output = tmp_path / "run"
    train(diffusion_config(stripe_folder, output, run_1, **{**OFTEN, **best}))
    (output / "state" / "best.json").write_text('{"step": 4}')
    latentdiff.publish(output, best=True)
    assert json.loads((output / "model" / "latentdiff.json").read_text())["steps"] == 4


def test_what_publish_refuses(tmp_path, stripe_folder, run_2, refused):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    assert "holds no training run" in refused("publish", other)
    assert "holds the steps 2, 3, 4" in refused("publish", run_2, "--step", "1")
    assert "no state was kept as the best; set train.best" in refused("publish", run_2, "--best")
    assert "give one of them" in refused("publish", run_2, "--best", "--step", "3")
    assert f"--out {other}: is not empty, and was not published by this run" in refused("publish", run_2, "--out", other)
    output = copy(run_2, tmp_path / "run")
    held = elsewhere(output)
    try:
        assert f"{output}: is in use by another run" in refused("publish", output)
    finally:
        held.kill()
        held.wait()
    (output / locks.NAME).unlink()  # else the next command removes it, and is seen to
    for kind in ("state", "snapshots"):
        file = output / kind / "step-4" / "ema.safetensors"
        tensors = load_file(file)
        save_file({key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}, file)
    assert "step-4: damaged (ema.safetensors: its content has changed)" in refused("publish", output, "--step", "4")


def test_a_run_says_which_steps_can_be_published_and_is_no_model(tmp_path, run_1, run_2, run, refused):
    facts = json.loads(run("info", run_2))
    assert facts["steps"] == [2, 3, 4] and facts["stage"] == "diffusion" and facts["published"] == ["model"]
    facts = json.loads(run("info", run_1))
    assert facts["steps"] == [1, 2, 3, 4] and facts["factor"] == 2
    assert f"did you mean {run_2 / 'model'}?" in refused("generate", "a", "--model", run_2)
    output = copy(run_2, tmp_path / "run")
    shutil.rmtree(output / "model")
    assert f"`latentdiff publish {output}`" in refused("generate", "a", "--model", output)
    unknown = write_yaml(tmp_path / "d.yaml", diffusion_tree(tmp_path, output, run_1))
    assert "no such" in refused("publish", unknown) or "holds no training run" in refused("publish", unknown)


def test_what_a_resumed_run_does_otherwise_is_said(tmp_path, stripe_folder, run_1, capsys):
    output = copy(run_1, tmp_path / "run")
    config = autoencoder_config(stripe_folder, output, **{**OFTEN, "train__steps": 5, "optimizer__lr": 1e-3})
    train(config, True)
    said = [line for line in capsys.readouterr().err.splitlines() if "goes on with" in line]
    assert said == [f"{output}: goes on with optimizer.lr=0.001 (was 0.005)", f"{output}: goes on with train.steps=5 (was 4)"]
