"""Numbers and names in a checkpoint's JSON that are wrong or hostile: one line each, no memory taken, no terminal driven."""

import json
import resource

import pytest
from hostile import write_checkpoint
from test_hashes import publish_text
from test_security import refusal
from tiny_stable import change_json

from latentdiff import checkpoints
from latentdiff.errors import UserError, printable
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.samplers.grids import make_grid
from latentdiff.schedules import make_schedule
from latentdiff.utils.fonts import labelled_font
from latentdiff.utils.images import labelled_grid

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    *(("model_index.json", "default_num_inference_steps", value) for value in (10**9, 0, -1, "x", 2.5, None, True, NAN, [])),
    *(("model_index.json", "default_guidance_scale", value) for value in (NAN, INF, -1, "x", None, [1])),
    *(("model_index.json", "default_guidance_interval", value) for value in ([0, 2], [1, 0], [NAN, 1], [0], "x", 5, [None, 1])),
    *(("model_index.json", "default_guidance_rule", value) for value in ("pag", 5, ["apg"])),
    *(("model_index.json", "default_guidance_rescale", value) for value in (NAN, -0.1, 1.5, "x", [1])),
    *(
        ("model_index.json", "default_guidance_options", value)
        for value in ({"parallel": 1}, {"eta": 1}, {"parallel": "x"}, [1], 5)
    ),
    *(("model_index.json", "image_size", value) for value in ([10**9] * 2, [0, 0], [-3, 5], [8], 8, "x", [8.0, 8.0], [NAN, 8])),
    *(("model_index.json", "null_class", value) for value in (10**12, -1, "x", 2.5)),
    *(("model_index.json", "class_names", value) for value in ({"x": "a"}, {"0": 5}, "abc", 5, [1], {"9" * 5000: "a"})),
    *(("unet/config.json", "sample_size", value) for value in (100_000, 10**12, 0, -4, "x", [8], [8, 0], [8, 10**9], 2.5, NAN)),
    *(("scheduler/scheduler_config.json", "num_train_timesteps", value) for value in (10**12, 0, -1, "x", None, NAN)),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "model"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def texted(tmp_path_factory):
    return publish_text(tmp_path_factory.mktemp("limits") / "text")


@pytest.fixture
def changed():
    """changed(file, key=value) writes it for the length of a test."""
    before = {}

    def change(file, **values):
        before.setdefault(file, file.read_text())
        change_json(file, **values)

    yield change
    for file, text in before.items():
        file.write_text(text)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(("file", "key", "value"), NUMBERS, ids=lambda value: str(value)[:30])
def test_numbers_that_cannot_be_are_named(shared, changed, file, key, value):
    changed(shared / file, **{key: value})
    before = peak()
    line = refusal(lambda: checkpoints.load(shared))
    assert line.startswith(f"{shared / file}: {key}"), line
    assert peak() - before < 200_000  # KiB


@pytest.mark.parametrize("length", [10**12, 10**30, 0, -1, 2, 9, "x", 2.5])
def test_a_prompt_length_beyond_the_encoder_is_named_before_the_tokenizer_aborts(texted, changed, length):
    file = texted / "tokenizer" / "tokenizer_config.json"
    changed(file, model_max_length=length)
    line = refusal(lambda: checkpoints.load(texted))
    assert line.startswith(f"{file}: model_max_length is ") and "from 3 to 8" in line
    if length not in (9, "x", 2.5):
        pipe = LatentDiffusionPipeline.from_pretrained(str(texted))
        with pytest.raises(ValueError, match="tokenizer: model_max_length"):
            pipe(prompt="a picture", num_inference_steps=1)


def test_a_missing_tokenizer_config_is_a_line(texted):
    file = texted / "tokenizer" / "tokenizer_config.json"
    text = file.read_text()
    file.unlink()
    try:
        assert refusal(lambda: checkpoints.load(texted)).startswith(f"{file}: model_max_length is not stated")
    finally:
        file.write_text(text)
    checkpoints.load(texted)


def test_the_pipeline_alone_refuses_them_too(shared, changed, refused):
    line = refused("generate", "a", "--model", shared, "--steps", 10**9, "--out", "x.png")
    assert "num_inference_steps 1000000000: must be at most 100000" in line
    for size in (100_000, [8, -1], 0):
        changed(shared / "unet" / "config.json", sample_size=size)
        pipe = LatentDiffusionPipeline.from_pretrained(str(shared))
        with pytest.raises(ValueError, match="unet/config.json: sample_size"):
            pipe(class_labels=0, num_inference_steps=1)


def test_more_steps_than_memory_are_refused_in_a_grid():
    with pytest.raises(UserError, match="at most 100000"):
        make_grid("uniform", make_schedule("vp"), 10**9)


def test_deep_and_huge_json_is_a_line(shared):
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        file = shared / name
        text = file.read_text()
        for raw in ("[" * 100_000, '{"a":' * 50_000, text[:-2] + ', "x": "' + "y" * 5_000_000):
            file.write_text(raw)
            assert name.split("/")[-1] in refusal(lambda: checkpoints.load(shared))
        file.write_text(text)
    checkpoints.load(shared)


EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\r\nb"


def test_class_names_do_not_drive_the_terminal(shared, changed, run, refused, capsys):
    changed(shared / "model_index.json", class_names={"0": EVIL, "1": "b", "2": "c"})
    line = refused("generate", "nothing", "--model", shared, "--out", "x.png")
    assert line.isprintable() and "owned" in line
    out = run("info", shared)
    assert all(each.isprintable() for each in out.splitlines())
    assert json.loads(out)["classes"][0] == EVIL
    run("generate", "0", "--model", shared, "--steps", 1, "--num-images", 1, "--out", "x.png")
    run("generate", "0", "--model", shared, "--steps", 1, "--num-images", 1, "--out", "x")
    with pytest.raises(ValueError, match="unknown class") as error:
        LatentDiffusionPipeline.from_pretrained(str(shared))(class_labels="nothing")
    assert str(error.value).isprintable()


def test_labels_of_grids_are_one_line():
    import numpy as np

    font, text = labelled_font(EVIL, 14)
    assert "\n" not in text and "\x1b" not in text
    labelled_grid([[np.zeros((8, 8, 3), np.uint8)]], [EVIL])


def test_printable_keeps_what_people_write():
    for text in ("Äpfel, 日本語, 👩‍👩‍👧, नमस्ते", "plain"):
        assert printable(text) == text
    assert printable("a\nb\x1b") == "a\\nb\\u001b" and printable("a\nb", keep="\n") == "a\nb"
