"""The tab Edit: the bytes of the command it shows, what each model and task is asked, masks, and the tab in the browser."""

import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from latentdiff import checkpoints
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.facts import read_facts
from latentdiff.web.jobs.edit import call_of, edit_picture, fields_of, mask_of, tasks_of

MODEL = Path(__file__).parent.parent.parent / "weights" / "fashion-mnist"


@pytest.fixture(scope="module")
def pipe():
    return checkpoints.load(MODEL)


@pytest.fixture(scope="module")
def facts():
    return read_facts("fashion-mnist", "weights/fashion-mnist", MODEL)


@pytest.fixture
def photo(tmp_path) -> Path:
    """A colour picture of a wide shape, so that the model's rule cuts it and makes it grey."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "my shoe.png")
    return tmp_path / "my shoe.png"


def files_of(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the files that edit wrote."""
    paths = [folder / "edited.png", *(folder / "edited").glob("*.png")]
    return {path.name: path.read_bytes() for path in paths}


def test_command_and_python_shown_give_the_same_bytes(pipe, facts, photo, tmp_path, here, monkeypatch):
    painted = np.zeros((280, 280, 1), np.uint8)
    painted[100:] = 90  # what the brush leaves over black
    mask = mask_of([painted], 28, 28)
    form = {
        "task": "inpaint",
        "method": "replacement",
        "strength": 0.6,
        "to": "Sneaker",
        "num_images": 2,
        "seed": 7,
        "steps": 3,
    }
    call = call_of(facts, form, photo.name)
    (tmp_path / "made").mkdir()
    made = edit_picture(pipe, MODEL, call, photo, mask, tmp_path / "made")
    ours = files_of(tmp_path / "made")
    assert {path.name for path in made.files} == {*ours, "mask.png"}
    assert len(made.after) == 2 and made.after[0].shape == made.before.shape == (28, 28, 1)
    known = mask == 0  # these pixels stay
    assert all((image[known] == made.before[known]).all() and (image != made.before).any() for image in made.after)

    # The command, run where the picture and the mask lie
    (here / photo.name).write_bytes(photo.read_bytes())
    (here / "mask.png").write_bytes((tmp_path / "made" / "mask.png").read_bytes())
    line = command_line("edit", call["images"], {name: value for name, value in call.items() if name != "images"})
    words = shlex.split(line)
    assert words[:3] == ["latentdiff", "edit", "my shoe.png"]
    main(words[1:])
    assert files_of(here) == ours

    # The Python code says the same
    arguments = {}
    code = python_call("edit", call)
    assert code.startswith("from latentdiff import edit\n")
    exec(code.split("\n", 1)[1], {"edit": lambda **given: arguments.update(given)})
    assert arguments == call


def test_no_path_of_the_server_in_a_message(pipe, facts, photo, tmp_path):
    call = call_of(facts, {"task": "img2img", "strength": 0.5}, photo.name)
    photo.write_bytes(b"no picture")
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="^IMAGE my shoe.png: cannot be read as an image") as caught:
        edit_picture(pipe, MODEL, call, photo, None, tmp_path / "made")
    assert str(tmp_path) not in str(caught.value)


def test_each_task_is_asked_what_it_reads(facts):
    assert "colorize" not in tasks_of(facts) and "img2img" == tasks_of(facts)[0]  # it draws in grey
    assert "strength" not in fields_of("inpaint", facts, "known_pixels")
    assert {"mask", "strength", "sampler"} <= fields_of("inpaint", facts, "replacement")
    assert fields_of("variations", facts) == {"num_images", "steps", "seed", "source", "strength"}
    of_text = fields_of("img2img", replace(facts, reads_text=True))
    assert "negative" in of_text and "source" not in of_text and "source" in fields_of("img2img", facts)
    trained = replace(facts, condition="mask")
    assert tasks_of(trained) == ["inpaint"] and "method" not in fields_of("inpaint", trained)
    assert "strength" not in fields_of("translate", replace(facts, bridge=True))
    assert tasks_of(replace(facts, over_codes=True)) == ["img2img", "inpaint"]
    # A setting that is left over from another task is not given
    form = {"task": "variations", "strength": 0.2, "to": "Bag", "sampler": "heun", "method": "posterior", "steps": None}
    call = call_of(facts, form | {"guidance": ""}, "a.png")
    assert set(call) == {"model", "images", "task", "strength", "out"}


@pytest.mark.parametrize(
    "form, line",
    [
        ({"task": "colorize"}, "task 'colorize': this model does not do it"),
        ({"task": "img2img", "steps": 2.5}, "steps: give a whole number"),
        ({"task": "img2img", "guidance": "much"}, "guidance: give a number"),
        ({"task": "img2img", "guidance": "nan"}, "guidance: give a number"),
        ({"task": "img2img", "seed": "nan"}, "seed: give a whole number"),
        ({"task": "img2img", "strength": [1]}, "strength: give a number"),
        ({"task": "img2img", "to": 3}, "to: must be text"),
        ({"task": "outpaint", "expand": "1 2 3"}, "expand: give one number"),
        ({"task": "outpaint", "expand": "1 2 x 3 4"}, "expand: give one number"),
    ],
)
def test_a_wrong_value_is_named(facts, form, line):
    with pytest.raises(UserError, match=f"^{line}"):
        call_of(facts, form, "a.png")


def test_mask_is_white_where_half_of_a_pixel_is_painted():
    layer = np.zeros((8, 16, 1), np.uint8)
    layer[:2, :3] = 120  # the first pixel whole; half of the second
    layer[4:6, 8:9] = 255  # a quarter of a pixel's width of 2: half of one
    layer[7, 15] = 255  # a quarter of the last one
    layer[0, 15] = 20  # a trace of the brush's edge
    mask = mask_of([layer], 4, 8)
    assert {(0, 0), (0, 1), (2, 4)} == {tuple(place) for place in np.argwhere(mask)}
    assert set(np.unique(mask)) == {0, 255}
    for nothing in ([], [np.zeros((8, 8, 1), np.uint8)]):
        with pytest.raises(UserError, match="^mask: nothing is painted"):
            mask_of(nothing, 4, 4)


def test_values_that_begin_with_a_dash_stay_values(here):
    line = command_line("edit", ["-x.png"], {"to": ["-1"], "seed": -3, "weak": True, "mask": None, "expand": (1, 2, 3, 4)})
    assert line == "latentdiff edit ./-x.png --to=-1 --seed=-3 --weak --expand 1 2 3 4"


def test_the_tab_in_the_browser(visit, site, photo, here):
    page = visit.page
    page.get_by_role("tab", name="Edit").click()
    panel = page.get_by_role("tabpanel")  # the one that is shown
    panel.locator("input[type=file]").first.set_input_files(photo)
    expect(page.get_by_role("img", name="Picture").or_(panel.locator("img[src*='shoe']")).first).to_be_visible()
    panel.get_by_text("Fill the painted part").click()
    panel.get_by_text("replacement: has a strength").click()
    expect(panel.get_by_label("number input for Strength")).to_be_visible()
    panel.get_by_text("Steps and guidance").click()
    steps = panel.get_by_label("Steps", exact=True)
    panel.locator("canvas").first.wait_for()

    # Paint a stroke. The canvas is ready a moment after it is there
    page.wait_for_timeout(2000)
    panel.locator("canvas").first.scroll_into_view_if_needed()
    box = panel.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 50, y)
    page.mouse.down()
    page.mouse.move(x + 50, y, steps=5)
    page.mouse.up()

    # A limit is one line
    steps.fill("121")
    press(panel, "Edit")
    expect(panel.locator("#edit-status")).to_contain_text("steps 121: must be from 1 to 120, the server's --max-steps")

    # What is painted is filled, with the bytes of the command
    steps.fill("2")
    press(panel, "Edit")
    expect(panel.locator("#edit-status")).to_have_text("Done.")
    expect(panel.locator("#edit-slider img")).to_have_count(2)
    tops = panel.locator("#edit-slider img").evaluate_all("all => all.map(image => image.getBoundingClientRect().y)")
    assert abs(tops[0] - tops[1]) <= 1.5  # before and after lie on each other
    links = [link.get_attribute("href") for link in panel.locator("#edit-files a").all()]
    made = {link.rsplit("/", 1)[1].split("?")[0]: page.request.get(link).body() for link in links}
    (here / photo.name).write_bytes(photo.read_bytes())
    (here / "mask.png").write_bytes(made.pop("mask.png"))
    main(shlex.split(panel.locator(".cm-content").first.inner_text().replace("\n", ""))[1:])
    assert made == files_of(here) and len(made) == 2
    share = np.asarray(Image.open(here / "mask.png")).mean() / 255
    assert 0.01 < share < 0.5  # the stroke, and not the whole picture

    # Stop ends the work
    panel.get_by_text("Change it").click()
    steps.fill("120")
    panel.get_by_label("number input for Number of results").fill("20")
    press(panel, "Edit")
    expect(panel.locator("#edit-status")).to_contain_text("Working …")
    press(panel, "Stop")
    expect(panel.locator("#edit-status")).to_have_text("Stopped.")
    end = time.monotonic() + 60
    while site.context.work.running:
        assert time.monotonic() < end, "it was not stopped"
        time.sleep(0.05)


def press(panel: Locator, name: str) -> None:
    panel.get_by_role("button", name=name, exact=True).click()
