"""The tab Explore: the bytes of the command and of the Python that it shows, and the tab in the browser."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from latentdiff import checkpoints
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.evaluation.memorization import nearest_by_pixels
from latentdiff.evaluation.reference_data import reference_sets
from latentdiff.web.jobs.explore import between, nearest, path_of, scales_of, sweep

SHOWN = "weights/fashion-mnist"
MODEL = Path(__file__).parent.parent.parent / SHOWN


@pytest.fixture(scope="module")
def pipe():
    return checkpoints.load(MODEL)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def run_shown(line: str) -> None:
    """Run a command that the page shows."""
    words = shlex.split(line)
    assert words[0] == "latentdiff"
    main(words[1:])


def test_interpolation_is_that_of_the_command(pipe, folder, here):
    way = between(pipe, MODEL, SHOWN, ("Sneaker", "Bag"), [], 3, 4, 2, None, folder)
    run_shown(way.command)
    assert (here / "way.webp").read_bytes() == way.file.read_bytes()
    assert way.captions == ["0.00", "0.50", "1.00"]
    assert [image.shape for image in way.images] == [(28, 28, 3)] * 3
    assert all((way.images[k] != way.images[k + 1]).any() for k in range(2))


def test_interpolation_of_two_pictures_of_one_name(pipe, folder, here, tmp_path):
    files = []
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        files.append(tmp_path / side / "photo.png")
        pixels = np.random.default_rng(len(files)).integers(0, 255, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(files[-1])
    way = between(pipe, MODEL, SHOWN, ("", ""), files, 2, 0, 2, 3.0, folder)  # guidance has no part between pictures
    for name in ("photo.png", "2-photo.png"):
        (here / name).write_bytes((folder / name).read_bytes())
    assert (here / "2-photo.png").read_bytes() == files[1].read_bytes()
    run_shown(way.command)
    assert (here / "way.webp").read_bytes() == way.file.read_bytes()
    with pytest.raises(UserError, match="^picture: between pictures there are two"):
        between(pipe, MODEL, SHOWN, ("", ""), files[:1], 2, 0, 2, None, folder)
    files[0].write_bytes(b"no picture")
    with pytest.raises(UserError, match="^IMAGE photo.png: cannot be read"):  # no path of the server
        between(pipe, MODEL, SHOWN, ("", ""), files, 2, 0, 2, None, folder)


def test_guidance_at_several_scales_is_that_of_the_python(pipe, folder, here):
    swept = sweep(pipe, SHOWN, "Sneaker", [1.0, 4.0], 2, 3, 2, "ddim", folder)
    exec(swept.code, {})
    assert (here / "guidance.png").read_bytes() == swept.file.read_bytes()
    assert swept.captions == ["1", "4", "1", "4"]
    # Each row of the gallery is one noise: its images are nearer to each other than to those of the other noise
    first, guided, other, _ = (image.astype(float) for image in swept.images)
    assert 0 < np.abs(first - guided).mean() < np.abs(first - other).mean()
    alone = sweep(pipe, SHOWN, "Sneaker", [4.0], 1, 3, 2, "ddim", folder)
    assert (alone.images[0] == swept.images[1]).all()  # an image depends on its own settings alone
    with pytest.raises(UserError, match="^guidance: changes nothing here"):
        sweep(pipe, SHOWN, "", [1.0], 1, 0, 2, "ddim", folder)
    with pytest.raises(UserError, match="^scales: -1: must be at least 0"):
        sweep(pipe, SHOWN, "Bag", [2.0, -1.0], 1, 0, 2, "ddim", folder)
    with pytest.raises(UserError, match="^--sampler nothing: unknown"):
        sweep(pipe, SHOWN, "Bag", [2.0], 1, 0, 2, "nothing", folder)


def test_trajectory_has_each_step_and_ends_on_the_image(pipe, folder, here):
    path = path_of(pipe, SHOWN, "Bag", 3, 10, "ddim", 4.0, folder)
    exec(path.code, {})
    assert (here / "trajectory.png").read_bytes() == path.file.read_bytes()
    assert path.captions == [f"step {k}" for k in range(1, 11)]  # more than the eight of `latentdiff gallery`
    default = path_of(pipe, SHOWN, "Bag", 3, 10, "ddim", None, folder)
    assert (default.images[-1] != path.images[-1]).any()  # the scale is heard


def test_nearest_training_images_are_those_of_a_search_through_all(stripe_folder):
    train, held_out = reference_sets(str(stripe_folder))
    steps = []
    found = nearest(held_out.batch([0])[0][0], train, 5, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(train), len(train))
    differences = (train.batch(range(len(train)))[0] - held_out.batch([0])[0]) / 2
    expected = differences.square().mean(dim=(1, 2, 3)).sqrt()
    assert [k for _, k in found] == expected.argsort()[:5].tolist()
    assert [distance for distance, _ in found] == pytest.approx(expected.sort().values[:5].tolist(), rel=1e-5)
    closest, _ = nearest_by_pixels(held_out, held_out, train)
    assert found[0] == (pytest.approx(closest.distances[0].item()), closest.rows[0].item())
    assert nearest(train.batch([7])[0][0], train, 1, lambda *_: None) == [(0.0, 7)]
    assert len(nearest(train.batch([7])[0][0], train, 1000, lambda *_: None)) == len(train)  # there are no more


def test_scales_are_numbers():
    assert scales_of(" 1, 2.5 8 ") == [1.0, 2.5, 8.0]
    for text in ("", "1 two", "nan", " ".join(["1"] * 13), None):
        with pytest.raises(UserError, match="^scales: give "):
            scales_of(text)


def fill_opened(field, text):
    """Fill a field of a part that was just opened: gradio may still put its first value there."""
    for _ in range(20):
        field.fill(text)
        field.page.wait_for_timeout(250)
        if field.input_value() == text:
            return
    raise AssertionError(f"the field keeps {field.input_value()!r}")


def test_the_tab_in_the_browser(visit, here):
    page = visit.page
    page.get_by_role("tab", name="Explore").click()
    panel = page.get_by_role("tabpanel")  # the one that is shown
    panel.get_by_label("Steps", exact=True).fill("2")
    panel.get_by_label("Images of the way").fill("3")
    panel.get_by_role("button", name="Go from one to another").click()
    expect(panel.locator("#explore-interpolate")).to_have_text("Done.")
    link = panel.locator("#explore-interpolate-file a").first.get_attribute("href")
    made = page.request.get(link).body()
    run_shown(panel.locator(".cm-content").first.inner_text().replace("\n", ""))
    assert (here / "way.webp").read_bytes() == made
    # The slider chooses an image of the way
    place = panel.get_by_label("number input for Place on the way")
    expect(place).to_have_value("3")
    place.fill("2")
    expect(panel.get_by_text("0.50").first).to_be_visible()

    panel.get_by_role("button", name="What guidance does").click()
    fill_opened(panel.get_by_label("Scales of guidance"), "1 3")
    fill_opened(panel.get_by_label("Images of each scale"), "21")
    panel.get_by_role("button", name="Draw at each scale").click()
    line = "number of images 42: must be from 1 to 20, the server's --max-images"
    expect(panel.locator("#explore-guidance")).to_contain_text(line)
    panel.get_by_label("Images of each scale").fill("1")
    panel.get_by_role("button", name="Draw at each scale").click()
    expect(panel.locator("#explore-guidance")).to_have_text("Done.")

    panel.get_by_role("button", name="From noise to an image").click()
    panel.get_by_role("button", name="Draw step by step").click()
    expect(panel.locator("#explore-trajectory")).to_have_text("Done.")
    expect(panel.get_by_label("number input for Step", exact=True)).to_have_value("2")
