"""The command, the models of a server, and its API."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import asked
import httpx
import pytest
from diffusers import DDIMScheduler
from gradio_client import Client, handle_file
from PIL import Image
from served import LIMITS, running_site
from tiny_models import tiny_unet, tiny_vae

from latentdiff import checkpoints, discrete, samplers
from latentdiff.checkpoints import INDEX, save
from latentdiff.errors import UserError
from latentdiff.evaluation.gallery import SCALES
from latentdiff.web.facts import find_models, read_facts
from latentdiff.web.generate import as_command
from latentdiff.web.jobs.draw import Settings, draw
from latentdiff.web.jobs.job import Job
from latentdiff.web.jobs.models import Models
from latentdiff.web.limits import Limits
from latentdiff.web.serve import BODY

WEIGHTS = Path(__file__).parent.parent.parent / "weights"
FASHION = {"fashion-mnist": WEIGHTS / "fashion-mnist"}


# The command


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--max-images", 0], "--max-images 0: must be at least 1"),
        (["--queue", -1], "--queue -1: must be at least 1"),
        (["--port", 70000], "--port 70000: must be from 0 to 65535; 0 takes a free one"),
        (["--runs", "nowhere"], "--runs nowhere: no such folder"),
        (["nowhere"], "MODEL 'nowhere': no such folder"),
        (["--device", "gpu"], "--device gpu: is no device of this machine"),
        (["--host", "not an address"], "--host not an address --port 7860: cannot be listened at"),
    ],
)
def test_a_wrong_call_is_refused(refused, arguments, line):
    assert refused("serve", *arguments).startswith(f"latentdiff: {line}")


def tiny_model(folder: Path) -> Path:
    """A checkpoint of two classes."""
    return save(folder, tiny_unet(num_class_embeds=3), tiny_vae(), DDIMScheduler(clip_sample=False), {}, prediction="epsilon")


def test_a_damaged_model_is_refused(refused, tmp_path):
    model = tiny_model(tmp_path / "model")
    (model / "unet" / "config.json").write_text("{}")
    assert str(model / "unet") in refused("serve", str(model), "--port", 0)


def test_a_model_whose_weights_are_damaged_ends_the_server(tmp_path):
    """The page is open by then."""
    (weights,) = (tiny_model(tmp_path / "model") / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command = [sys.executable, "-m", "latentdiff", "serve", str(tmp_path / "model"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    address, line = (done.stdout + done.stderr).strip().splitlines()
    assert address.startswith("latentdiff: http://127.0.0.1:") and done.returncode == 2
    assert line.startswith(f"latentdiff: {weights}: its sha256 is not the one in hashes.json")


@pytest.mark.parametrize("content", ["[1]", '{"format": '])
def test_a_model_whose_description_is_damaged_is_refused(tmp_path, content):
    file = tiny_model(tmp_path / "model") / "latentdiff.json"
    file.write_text(content)
    command = [sys.executable, "-m", "latentdiff", "serve", str(tmp_path / "model"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"latentdiff: {file}: ")


def test_data_that_cannot_be_the_models_ends_the_server(tmp_path):
    """The page is open by then, as the process that knows the model reads them."""
    nowhere = tmp_path / "nowhere"
    command = [
        sys.executable,
        "-m",
        "latentdiff",
        "serve",
        str(WEIGHTS / "fashion-mnist"),
        "--port",
        "0",
        "--data",
        str(nowhere),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    address, line = (done.stdout + done.stderr).strip().splitlines()
    assert address.startswith("latentdiff: http://127.0.0.1:") and done.returncode == 2
    assert line.startswith(f"latentdiff: --data {nowhere}: ") and "no such folder" in line


def test_the_page_is_open_before_the_model_is_loaded(tmp_path):
    go_on = tmp_path / "go on"
    setup = partial(asked.models_after, FASHION, go_on)
    with running_site(FASHION, None, Limits(), tmp_path / "served", setup) as site:
        assert "fashion-mnist" in httpx.get(f"{site.url}config").text
        address = f"{site.url}gradio_api/call/generate"
        event = httpx.post(address, json={"data": ["fashion-mnist", ["Bag"], "", "", 1, 0, 1, "default", 1, 0, 1, None, None]})
        assert site.context.work.running <= 1 and not go_on.exists()
        go_on.touch()
        answer = httpx.get(f"{address}/{event.json()['event_id']}", timeout=120).text
        assert "event: complete" in answer and "1 image in" in answer


def test_a_wrong_address_is_not_blamed_on_the_port(refused):
    assert refused("serve", "--host", "192.0.2.1").endswith("give another --host, such as 127.0.0.1")


def test_a_port_in_use_is_refused(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("serve", "--port", port)
        assert f"--port {port}: cannot be listened at" in line and line.endswith("give another --port")


def test_importing_the_command_is_light():
    heavy = {"gradio", "torch", "diffusers"}
    code = f"import sys, latentdiff.web.serve; print(*({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


def test_a_request_does_not_wait_until_pyplot_is_imported():
    code = """
import os, sys
from latentdiff.web.serve import NO_PYPLOT
os.environ.update(NO_PYPLOT)
import gradio.utils
with gradio.utils.MatplotlibBackendMananger():
    pass
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False"], done.stderr


def test_a_fit_stands_for_its_model_and_its_runs(tmp_path):
    fit = tmp_path / "my-images"
    fit.mkdir()
    (fit / "fit.json").write_text("{}")
    assert find_models([str(fit)]) == ({}, fit)  # training goes on
    (fit / "model").symlink_to(WEIGHTS / "fashion-mnist")
    assert find_models([str(fit)]) == ({"my-images": fit / "model"}, fit)
    folders, runs = find_models(["weights/fashion-mnist", str(WEIGHTS / "fashion-mnist")])
    assert list(folders) == ["fashion-mnist", "fashion-mnist (2)"] and runs is None


# Models


def test_models_are_loaded_when_used_and_the_last_used_stay():
    names = {name: WEIGHTS / "fashion-mnist" for name in "abc"}
    models = Models(names, keep=2)
    assert models.loaded == []
    for name in "aba":
        with models.use(name):
            pass
    assert models.loaded == ["b", "a"]
    with models.use("c"):
        assert models.loaded == ["a", "c"]
    facts = models.facts("b")  # which was freed: what is known of it stays
    assert models.loaded == ["a", "c"] and facts.class_names[7] == "Sneaker" and facts.steps == 7
    assert (facts.shown, facts.pixels, facts.can_guide) == ("weights/fashion-mnist", 784, True)
    with pytest.raises(UserError, match="model 'd': unknown; valid: a, b, c"):
        models.facts("d")


def test_facts_are_those_of_the_loaded_pipeline(discrete_run, tmp_path):
    """The page reads them of a checkpoint's files, before torch is there."""
    rule = {"kind": "low_resolution", "factor": 2, "dropped": False}
    about = {"image_condition": rule, "prediction": "epsilon", "null_class": 2}
    save(
        tmp_path / "enlarge",
        tiny_unet(in_channels=8, num_class_embeds=3),
        tiny_vae(),
        DDIMScheduler(clip_sample=False),
        {},
        **about,
    )
    folders = {name: WEIGHTS / name for name in ("fashion-mnist", "emoji")}
    folders |= {"codes": discrete_run / "model", "enlarge": tmp_path / "enlarge"}
    for name, folder in folders.items():
        read, pipeline = read_facts(name, name, folder), checkpoints.load(folder)
        assert read.image_shape == pipeline.image_shape and read.over_codes == hasattr(pipeline, "num_codes")
        assert read.class_names == tuple(pipeline.class_names or map(str, range(pipeline.num_classes)))
        assert read.reads_text == (pipeline.text_encoder is not None)
        config = pipeline.config
        assert (read.steps, read.guidance) == (config.default_num_inference_steps, config.default_guidance_scale)
        assert read.interval == tuple(config.default_guidance_interval or (0, 1))
        assert read.samplers == (discrete.ORDERS if read.over_codes else tuple(samplers.names()))
        assert Models(folders).facts(name) == replace(read, shown=Models(folders).shown(name))
    every = [read_facts(name, name, folder) for name, folder in folders.items()]
    assert [facts.condition for facts in every] == ["", "", "", "low_resolution"]
    assert [facts.can_guide for facts in every] == [True] * 4
    (tmp_path / "enlarge" / "unet" / "config.json").write_text("{}")
    assert read_facts("enlarge", "enlarge", tmp_path / "enlarge") is None
    # A checkpoint of another program does not say how latentdiff is to call it
    shutil.copytree(WEIGHTS / "emoji", tmp_path / "foreign", ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in WEIGHTS.glob("emoji/*/*.safetensors"):
        (tmp_path / "foreign" / weights.parent.name / weights.name).symlink_to(weights)
    index = json.loads((WEIGHTS / "emoji" / INDEX).read_text())
    index = {key: value for key, value in index.items() if not key.startswith(("default_", "null_", "class_", "image_"))}
    (tmp_path / "foreign" / INDEX).write_text(json.dumps(index))
    assert read_facts("foreign", "foreign", tmp_path / "foreign") is None
    facts = Models({"foreign": tmp_path / "foreign"}).facts("foreign")
    assert (facts.steps, facts.guidance, facts.reads_text) == (50, 7.5, True)


def test_a_model_over_codes_draws_the_bytes_of_its_command(discrete_run, tmp_path, run, monkeypatch):
    monkeypatch.setattr("latentdiff.web.jobs.draw.BETWEEN", 0)  # every step is shown
    models = Models({"codes": discrete_run / "model"})
    facts = models.facts("codes")
    assert facts.over_codes and facts.samplers == ("random", "confidence")
    pictures = []

    class Watching(Job):
        def step(self, step, steps=0, shown=None):
            pictures.append(shown)

    settings = Settings("codes", ["down"], num_images=2, steps=3, sampler="confidence")
    drawn = draw(models, Watching(), Limits(), settings, tmp_path)
    assert [picture.width for picture in pictures] == sorted({picture.width for picture in pictures}) and len(pictures) == 3
    words = as_command(facts, drawn.arguments).split()
    run(*[str(discrete_run / "model") if word == "codes" else word for word in words[1:]])
    made = Path("images")
    assert {file.name: file.read_bytes() for file in made.iterdir()} == {f.name: f.read_bytes() for f in drawn.files}


# The API


def test_the_api_gives_the_same_files(site, models, tmp_path):
    client = Client(site.url, download_files=str(tmp_path / "client"), verbose=False)
    result = client.predict(model="fashion-mnist", classes=["Sneaker"], num_images=2, seed=7, steps=3, api_name="/generate")
    status, _, images, archive, command, _ = result
    assert status.startswith("2 images in") and command.startswith("latentdiff generate Sneaker --model weights/fashion-mnist")
    settings = Settings("fashion-mnist", ["Sneaker"], num_images=2, seed=7, steps=3)
    drawn = draw(models, Job(), LIMITS, settings, tmp_path)
    expected = [file.read_bytes() for file in drawn.files]
    assert [Path(entry["image"]).read_bytes() for entry in images] == expected
    with zipfile.ZipFile(archive) as pack:
        assert [pack.read(name) for name in sorted(pack.namelist())] == expected
    with pytest.raises(Exception, match="steps 121: must be from 1 to 120, the server's --max-steps"):
        client.predict(model="fashion-mnist", classes=["Sneaker"], steps=121, api_name="/generate")


def test_in_the_api_fields_may_be_left_out_and_values_are_plain(site, tmp_path):
    client = Client(site.url, download_files=str(tmp_path / "client"), verbose=False)
    picture = tmp_path / "shoe.png"
    Image.new("RGB", (40, 40), "white").save(picture)
    given = {"picture": handle_file(picture), "model": "emoji", "task": "colorize", "steps": "1"}
    both, gallery, files, _, command, python = client.predict(**given, api_name="/edit")
    assert [Path(file).exists() for file in (*both, *files)] == [True] * 4 and len(gallery) == 1
    assert command.startswith("latentdiff edit shoe.png --model weights/emoji --task colorize")
    assert python.startswith("from latentdiff import edit")
    _, way, file, command, python = client.predict(model="fashion-mnist", frames=2, steps=1, api_name="/interpolate")
    assert len(way) == 2 and Path(file).name == "way.webp" and command.startswith("latentdiff edit")
    for name, shown in (("/guidance", 3 * len(SCALES)), ("/trajectory", 1)):
        _, images, file, command, python = client.predict(model="fashion-mnist", steps=1, api_name=name)
        assert len(images) == shown and Path(file).suffix == ".png" and command == "" and "GallerySampler" in python


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("/generate", {"seed": "abc"}, "seed: give a whole number"),
        ("/generate", {"num_images": 1.5}, "number of images: give a whole number"),
        ("/generate", {"num_images": 0}, "number of images 0: must be from 1 to 20"),
        ("/generate", {"guidance": "much"}, "guidance: give a number"),
        ("/generate", {"classes": "Bag"}, "classes: give a list of names"),
        ("/generate", {"model": ["emoji"]}, "model .*: unknown; valid: fashion-mnist, emoji"),
        ("/edit", {"task": "colorize"}, "task 'colorize': this model does not do it; valid: "),
        ("/edit", {"strength": 2}, "strength"),
        ("/edit", {"blur": "much", "task": "deblur"}, "blur: give a number"),
        ("/trajectory", {"steps": 0}, "steps 0: must be from 1 to 120"),
        ("/interpolate", {"frames": -1}, "number of images -1: must be from 1 to 20"),
    ],
)
def test_in_the_api_a_mistake_is_one_line_that_names_the_field(site, tmp_path, capfd, name, fields, line):
    client = Client(site.url, download_files=str(tmp_path / "client"), verbose=False)
    picture = tmp_path / "shoe.png"
    Image.new("L", (28, 28)).save(picture)
    given = {"picture": handle_file(picture)} if name == "/edit" else {}
    with pytest.raises(Exception, match=line):
        client.predict(**{"model": "fashion-mnist", **given, **fields}, api_name=name)
    assert "Traceback" not in capfd.readouterr().err


def test_the_fields_of_the_documentation_draw_images(site):
    text = (WEIGHTS.parent / "docs" / "serve.md").read_text()
    (fields,) = re.findall(r"-d '(\{.*\})'", text)
    address = f"{site.url}gradio_api/call/generate"
    event = httpx.post(address, json=json.loads(fields)).json()["event_id"]
    answer = httpx.get(f"{address}/{event}", timeout=120).text
    assert "event: complete" in answer and "4 images in" in answer and "event: error" not in answer


def test_no_more_requests_wait_than_the_queue_may_hold(tmp_path, monkeypatch):
    """One runs, one waits, and the third is refused in one line; what was asked for before it is drawn all the same."""
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    held_up = partial(asked.wait_for, begun=begun, go_on=go_on, then=draw)
    monkeypatch.setattr("latentdiff.web.generate.draw", held_up)
    with running_site(FASHION, None, Limits(queue=1), tmp_path / "served") as busy:
        address = f"{busy.url}gradio_api/call/generate"
        fields = {"data": ["fashion-mnist", ["Bag"], "", "", 1, 0, 1, "default", 1, 0, 1, None, None]}
        first = httpx.post(address, json=fields)
        end = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        second, third = (httpx.post(address, json=fields) for _ in range(2))
        assert third.status_code == 503 and "Max size is 1" in third.json()["detail"]
        go_on.touch()
        for accepted in (first, second):
            answer = httpx.get(f"{address}/{accepted.json()['event_id']}", timeout=120).text
            assert "event: complete" in answer and "1 image in" in answer


@pytest.mark.parametrize("chunked", [False, True])
def test_the_bytes_of_every_request_are_limited(site, chunked):
    limit = site.context.limits.upload + BODY
    body = b'{"data": ["' + b"x" * limit + b'"]}'
    content = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{site.url}gradio_api/call/generate", content=content, headers=headers)
    assert (answer.status_code, answer.json()) == (413, {"detail": f"request: at most {limit:,} bytes are allowed"})


def test_an_uploaded_file_is_limited(site):
    files = {"files": ("a.png", b"x" * (site.context.limits.upload + 1))}
    answer = httpx.post(f"{site.url}gradio_api/upload", files=files)
    assert (answer.status_code, answer.text) == (413, "File size exceeded maximum allowed size of 200000 bytes.")
