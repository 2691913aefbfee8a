"""What a run says beside its progress: verdicts, warnings and places, at the terminal and not in a file alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_estimate import of_the_config
from tiny_runs import autoencoder_config, autoencoder_tree, diffusion_config, diffusion_tree, tree, write_yaml
from tiny_text import ENCODER, text_tree, write_bert, write_captioned

from latentdiff.cli import main
from latentdiff.cli.info import info
from latentdiff.config import TrainConfig
from latentdiff.training import messages, train, train_autoencoder, train_diffusion
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.estimate import PlanningProgress
from latentdiff.training.logging import RunLogger
from latentdiff.training.precision import OneProcess, plain_steps


@pytest.fixture
def said(capsys):
    """said(action) -> the lines that it writes on stderr."""

    def call(action) -> list[str]:
        capsys.readouterr()
        action()
        return capsys.readouterr().err.splitlines()

    return call


def about(lines: list[str], *words: str) -> list[str]:
    return [line for line in lines if all(word in line for word in words)]


# Stage 1's verdict


def test_the_first_stages_verdict_is_printed_and_goes_with_its_weights(said, stripe_folder, tmp_path):
    output = tmp_path / "first"
    lines = said(lambda: train(autoencoder_config(stripe_folder, output, train__steps=2)))
    report = json.loads((output / "report.json").read_text())
    weak = [line for line in report["lines"] if line.startswith("warn: ")]
    assert weak and about(lines, f"{len(weak)} of {len(report['lines'])} points are weak")
    for line in report["lines"]:
        assert f"  {line}" in lines
    assert about(lines, f"see {output / 'report.png'}") and about(lines, f"autoencoder={output / 'autoencoder'}")
    # The same again where stage 2 begins on it, by whatever name, and wherever the weights went
    moved = shutil.copytree(output / "autoencoder", tmp_path / "moved")
    for name in (output, output / "autoencoder", moved):
        expected = [f"autoencoder {name}: {line.removeprefix('warn: ')}" for line in weak]
        assert messages.autoencoder_warnings(str(name)) == expected
        config = diffusion_config(
            stripe_folder, tmp_path / f"second-{Path(name).name}", name, train__steps=1, normaliser="measured"
        )
        lines = said(lambda config=config: train(config))
        start = next(k for k, line in enumerate(lines) if line.startswith("latentdiff train: "))
        assert lines[start + 1 : start + 1 + len(weak)] == [f"warning: {line}" for line in expected]
    path = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "third", moved, normaliser="measured"))
    lines = said(lambda: main(["encode", str(path)]))
    assert [f"warning: autoencoder {moved}: {line.removeprefix('warn: ')}" in lines for line in weak] == [True] * len(weak)
    assert about(lines, "latentdiff encode: ", "precision float32") and about(lines, "latents of 36 images into", "MiB")
    assert [text for text in info(str(path))["warnings"] if text.startswith(f"autoencoder {moved}: ")] == [
        f"autoencoder {moved}: {line.removeprefix('warn: ')}" for line in weak
    ]


def test_a_good_or_a_foreign_first_stage_is_not_warned_of(tmp_path, autoencoder_run):
    folder = shutil.copytree(autoencoder_run / "autoencoder", tmp_path / "good")
    (folder / "report.json").write_text(json.dumps({"lines": ["pass: PSNR 30 dB"]}))
    assert messages.autoencoder_warnings(str(folder)) == []
    for damaged in ("{", "[]", '{"lines": 3}'):
        (folder / "report.json").write_text(damaged)
        assert messages.autoencoder_warnings(str(folder)) == []
    assert messages.autoencoder_warnings("someone/autoencoder") == []
    assert messages.autoencoder_finished(folder, ["pass: PSNR 30 dB"])[0].endswith("all points pass")


# Where everything is


def test_both_stages_say_where_pictures_curves_and_results_are(said, stripe_folder, autoencoder_run, tmp_path, here):
    first, second = tmp_path / "first", tmp_path / "second"
    lines = said(lambda: train(autoencoder_config(stripe_folder, first, train__steps=2, train__picture_every=2)))
    (start,) = about(lines, f"{first / 'pictures'} every 2 steps", str(first / "metrics.jsonl"), f"--logdir {first / 'logs'}")
    lines = said(lambda: train(autoencoder_config(stripe_folder, tmp_path / "short", train__steps=2)))
    assert about(lines, f"pictures: {tmp_path / 'short' / 'report.png'} at the end")  # the period is beyond the run
    assert not (tmp_path / "short" / "pictures").exists()
    lines = said(lambda: train(diffusion_config(stripe_folder, second, autoencoder_run, train__steps=2)))
    assert about(lines, f"{second / 'pictures'} at the end") and len(list((second / "pictures").iterdir())) == 1
    assert about(lines, f"the model is in {second / 'model'}")
    (line,) = about(lines, "see more: ")
    command = line.removeprefix("see more: latentdiff ").split()
    main([*command, "--num-images", "1", "--steps", "1"])
    assert (here / "samples.png").is_file()


@pytest.mark.parametrize("condition", ["none", "text", "class+text"])
def test_the_command_that_is_named_draws_a_picture(condition, said, autoencoder_run, tmp_path, here):
    import shlex

    data = write_captioned(tmp_path / "data")
    build = text_tree if "text" in condition else diffusion_tree
    changes = {"condition": {"type": condition}} if condition == "none" else {"condition__type": condition}
    from latentdiff.config import parse_config

    config = parse_config(build(data, tmp_path / "run", autoencoder_run, train__steps=1, **changes))
    (line,) = about(said(lambda: train(config)), "see more: ")
    main([*shlex.split(line.removeprefix("see more: latentdiff ")), "--num-images", "1", "--steps", "1"])
    assert (here / "samples.png").is_file()


# What is likely wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__warmup_steps": 4}, "optimizer.warmup_steps: the learning rate rises for 4 steps, and the run has 6"),
        ({"optimizer__warmup_steps": 500}, "optimizer.warmup_steps: the learning rate rises for 500 steps, and the run has 6"),
        ({"ema__decay": 0.999}, "ema.decay: 0.999 takes 693 steps to forget half of the old weights, and the run has 6"),
        ({"train__batch_size": 40}, "train.batch_size: 40, but only 36 images train"),
        ({"train__steps": 2}, "train.steps: 2 steps see 44% of the 36 images"),
        ({"loss__adversarial": 0.1, "loss__adversarial_start": 6}, "loss.adversarial_start: 6, but the run has 6 steps"),
    ],
)
def test_a_run_that_does_not_suit_its_length_is_warned_of_by_info_and_by_train(changes, words, said, stripe_folder, tmp_path):
    changes = {"ema__decay": 0.5, **changes}
    config = autoencoder_tree(stripe_folder, tmp_path / "run", **changes)
    facts = info(str(write_yaml(tmp_path / "a.yaml", config)))
    (warning,) = facts["warnings"]
    assert warning.startswith(words)
    lines = said(lambda: train(autoencoder_config(stripe_folder, tmp_path / "run", **changes)))
    assert f"warning: {warning}" in lines


def test_what_suits_the_run_is_not_warned_of(stripe_folder, tmp_path):
    fine = {"ema__decay": 0.5, "optimizer__warmup_steps": 3, "train__batch_size": 36, "loss__adversarial": 0.1}
    fine["loss__adversarial_start"] = 5
    path = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", **fine))
    assert info(str(path))["warnings"] == []


def test_too_many_passes_over_few_images_are_warned_of(stripe_folder, tmp_path):
    config = autoencoder_config(stripe_folder, tmp_path, train__steps=4501)
    (warning,) = messages.data_warnings(config, 36)  # 4501 x 8 / 36 = 1000.2
    assert "4501 steps see each of the 36 images 1000 times" in warning and "4500 steps see them 1000 times" in warning
    assert messages.data_warnings(autoencoder_config(stripe_folder, tmp_path, train__steps=4500), 36) == []


def test_steps_that_the_clock_may_end_are_not_held_against_the_images(stripe_folder, tmp_path):
    config = autoencoder_config(stripe_folder, tmp_path, train__steps=10**9, train__minutes=5.0, train__picture_minutes=0.5)
    assert messages.data_warnings(config, 36) == messages.length_warnings(config) == []
    assert messages.where_results_appear(config).startswith(f"pictures: {tmp_path / 'pictures'} every 0.5 minutes; ")


def test_days_of_a_cpu_are_warned_of(monkeypatch, stripe_folder, tmp_path, said):
    def slow(*arguments):
        step = {"device": "cpu", "threads": 1, "precision": "float32"}
        return {"step": step, "hours": {"training": 135.0}}

    monkeypatch.setattr("latentdiff.training.estimate.dry_run", slow)
    path = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", train__steps=900))
    found = []
    lines = said(lambda: found.append(info(str(path))))
    (warning,) = found[0]["warnings"]
    assert warning.startswith("train.steps: the run takes 5.6 days of this CPU; 160 steps take one")
    assert about(lines, "on this machine (cpu, 1 CPU thread(s), float32) the run takes 1.4e+02 h of training") == lines[-1:]


@pytest.mark.parametrize("frozen", [False, True])
def test_captions_that_are_cut_are_said_by_info_and_before_encoding(frozen, said, autoencoder_run, tmp_path):
    data = write_captioned(tmp_path / "data")
    encoder = {"encoder": str(write_bert(tmp_path / "bert", "a picture of stripes"))} if frozen else ENCODER
    config = text_tree(data, tmp_path / "run", autoencoder_run, condition__text={**encoder, "max_length": 5}, train__steps=1)
    path = write_yaml(tmp_path / "t.yaml", config)
    (cut,) = [text for text in info(str(path))["warnings"] if "captions" in text]
    assert cut == "36 of 108 captions are longer than 5 tokens and are cut (condition.text.max_length)"
    from latentdiff.config import parse_config

    lines = said(lambda: train(parse_config(config)))
    place = {"cut": lines.index(f"warning: {cut}"), "run": next(k for k, x in enumerate(lines) if x.startswith("latentdiff"))}
    weak = messages.autoencoder_warnings(str(autoencoder_run))
    assert place["run"] < place["cut"] <= place["run"] + 1 + len(weak) + 2


# A U-Net that the latents do not fit


@pytest.mark.parametrize("command", ["train", "encode"])
def test_a_unet_that_does_not_divide_the_latents_is_refused_before_anything_is_encoded(
    command, refused, stripe_folder, autoencoder_run, tmp_path
):
    changes = {"data__size": [18, 18], "data__framing": "resize", "ema__decay": 0.5}  # latents 9x9 for two levels
    path = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    message = refused(command, path)
    assert "2 levels need latents divisible by 2, they are 9x9" in message and not (tmp_path / "run").exists()
    # Each piece of advice leads to a run that works
    size = re.search(r"data.size=(\[\d+, \d+\]) with data.framing=crop", message)[1]
    multiple = re.search(r"data.multiple_of=(\d+) with data.framing=pad", message)[1]
    assert (size, multiple) == ("[20, 20]", "4")
    main(["train", str(path), "output=" + str(tmp_path / "a"), f"data.size={size}", "data.framing=crop", "train.steps=1"])
    pad = ["data.framing=pad", "data.size=[18, 18]", f"data.multiple_of={multiple}", "normaliser=measured"]
    main(["train", str(path), "output=" + str(tmp_path / "c"), *pad, "train.steps=1"])
    facts = info(str(path), pad)
    assert facts["latent_shape"] == [2, 10, 10] and of_the_config(facts) == []


def test_sides_are_multiples_of_both_numbers(stripe_folder, autoencoder_run, tmp_path):
    config = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, data__framing="pad", data__multiple_of=3)
    facts = info(str(write_yaml(tmp_path / "d.yaml", config)), ["normaliser=measured"])
    assert facts["data"]["tensor"] == [1, 18, 18]  # of 2, the autoencoder's, and of 3


def test_a_first_stage_that_is_nowhere_is_warned_of(stripe_folder, tmp_path):
    path = write_yaml(
        tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", tmp_path / "nowhere", ema__decay=0.5)
    )
    (warning,) = info(str(path))["warnings"]
    assert warning.startswith(f"autoencoder: {tmp_path / 'nowhere'}: there is none yet") and "train it first" in warning


# The progress of info


def test_info_says_what_it_does_at_each_stage(said, stripe_folder, autoencoder_run, tmp_path):
    path = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run))
    lines = said(lambda: info(str(path), ["train.precision=auto"]))
    words = [
        "opening the autoencoder",
        "reading the images",
        "building the U-Net",
        "encoding a few images",
        "timing a few steps in float32 and in bfloat16",
        "timing training steps in",
        "on this machine (cpu",
    ]
    assert len(lines) == len(words)
    assert all(line.startswith(f"info: {start}") for line, start in zip(lines, words, strict=True)), lines


def test_lines_held_back_are_printed_after_a_moment_and_dropped_with_an_error(capsys, monkeypatch):
    with pytest.raises(ValueError, match="wrong"), PlanningProgress() as progress:
        progress("reading")
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("latentdiff.training.estimate.HOLD_BACK", 0.05)
    with pytest.raises(ValueError, match="wrong"), PlanningProgress() as progress:
        progress("reading")
        progress._timer.join(5)
        progress("building")
        raise ValueError("wrong")
    assert capsys.readouterr().err.splitlines() == ["info: reading", "info: building"]


# Steps that are timed are taken in the precision that they are timed in


def test_trials_of_the_other_trainers_run_in_the_precision_asked_for(monkeypatch, stripe_folder, autoencoder_run, tmp_path):
    kinds = []
    network = torch.nn.Linear(3, 3)

    def loss(module, batch):
        out = module(torch.randn(batch, 3))
        kinds.append((out.dtype, batch))
        return out.float().square().mean()

    step = plain_steps(OneProcess(torch.device("cpu")), network, loss)
    step("float32", 2)
    step("bfloat16", 4)
    assert kinds == [(torch.float32, 2), (torch.bfloat16, 4)]
    kinds.clear()
    monkeypatch.setattr(
        train_diffusion.DiffusionTrainer,
        "train_step",
        lambda trainer, *rest: kinds.append((trainer.config.train, trainer.accelerator.precision)),
    )
    config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run)
    codec = train_autoencoder.LatentCodec(train_autoencoder.load_autoencoder(str(autoencoder_run)))
    step = train_diffusion.DiffusionTrainer.trial_steps(config, codec, None, (2, 8, 8), 3, OneProcess(torch.device("cpu")))
    step("bfloat16", 4)
    ((told, ran),) = kinds
    assert (told.precision, told.batch_size, ran) == ("bfloat16", 4, "bfloat16")
    assert tree(tmp_path) == {}


def test_names_from_files_do_not_drive_the_terminal(capsys, tmp_path):
    """An escape code in a class or file name is written out by each of the trainer's own lines."""
    messages.print_lines(["a\x1b[2Jb"])
    with RunLogger(tmp_path, 1, 0, start_accelerator(TrainConfig(steps=1)), []) as log:
        log.print("c\x1b[2Jd\r")
    err = capsys.readouterr().err
    assert "a\\u001b[2Jb" in err and "c\\u001b[2Jd\\r" in err and "\x1b[2J" not in err
