"""A browser drives the tab Generate: a class, a prompt, the command's bytes, stop, the limits."""

import io
import shlex
import time
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from latentdiff.cli import main

STATUS = "#generate-status"
ROOT = Path(__file__).parent.parent.parent


def fill(page: Page, label: str, value) -> None:
    page.get_by_label(label, exact=True).fill(str(value))


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def files(page: Page) -> dict[str, bytes]:
    """The content of "Download all"."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Download all").click()
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as pack:
        return {Path(name).name: pack.read(name) for name in pack.namelist()}


def test_a_class_is_drawn_with_the_bytes_of_the_command(visit, here):
    page = visit.page
    fill(page, "Images of each", 3)
    fill(page, "Seed", 7)
    fill(page, "Steps", 4)
    press(page, "Generate")
    expect(page.locator(STATUS)).to_contain_text("3 images in")
    expect(page.locator("#generate-images img")).to_have_count(3)
    expect(page.locator("#generate-trajectory img")).to_be_visible()
    drawn = files(page)
    shown = page.locator(".cm-content").first.inner_text()
    main(shlex.split(shown)[1:])
    assert drawn == {file.name: file.read_bytes() for file in Path("images").iterdir()} and len(drawn) == 3
    # The picture itself, opened and downloaded, is the file of the command too
    page.locator("#generate-images button img").first.click()
    with page.expect_download() as download:
        page.locator("#generate-images").get_by_label("Download").click()
    assert Path(download.value.path()).read_bytes() == drawn["00000-T-shirt.png"]


def test_a_prompt_is_drawn_by_another_model(visit, here):
    page = visit.page
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="emoji").click()
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_be_visible()
    expect(page.get_by_label("Classes", exact=True)).to_be_hidden()
    prompt.fill("a red apple")
    fill(page, "Images of each", 1)
    fill(page, "Steps", 2)
    press(page, "Generate")
    expect(page.locator(STATUS)).to_contain_text("1 image in")
    (here / "weights").symlink_to(ROOT / "weights")
    main(shlex.split(page.locator(".cm-content").first.inner_text())[1:])
    assert list(files(page).values()) == [file.read_bytes() for file in Path("images").iterdir()]


def test_stop_ends_the_work(visit, site):
    page = visit.page
    fill(page, "Images of each", 16)
    fill(page, "Steps", 120)
    press(page, "Generate")
    expect(page.locator(STATUS)).to_contain_text("of 120")
    press(page, "Stop")
    expect(page.locator(STATUS)).to_contain_text("Stop")
    wait_until(lambda: site.context.work.running == 0, 60)
    fill(page, "Steps", 1)
    press(page, "Generate")  # the queue is free again
    expect(page.locator(STATUS)).to_contain_text("16 images in")
    assert len(files(page)) == 16


def test_stop_takes_a_request_out_of_the_queue(visit, site, browser):
    """A second visitor, whose request waits behind the first one's."""
    page = visit.page
    fill(page, "Steps", 120)
    press(page, "Generate")
    expect(page.locator(STATUS)).to_contain_text("of 120")
    context = browser.new_context()
    second = context.new_page()
    second.goto(site.url)
    press(second, "Generate")
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    press(second, "Stop")
    expect(second.locator(STATUS)).to_contain_text("Stopped.")
    press(page, "Stop")
    wait_until(lambda: site.context.work.running == 0, 60)
    second.wait_for_timeout(500)  # nothing of the second visitor's begins
    assert site.context.work.running == 0
    expect(second.locator(STATUS)).to_contain_text("Stopped.")
    context.close()


def test_work_ends_when_its_visitor_leaves(visit, site):
    page = visit.page
    fill(page, "Steps", 120)
    press(page, "Generate")
    expect(page.locator(STATUS)).to_contain_text("of 120")
    page.close()
    wait_until(lambda: site.context.work.running == 0, 60)


@pytest.mark.parametrize(
    ("label", "value", "line"),
    [
        ("Images of each", 21, "number of images 21: must be from 1 to 20, the server's --max-images"),
        ("Steps", 121, "steps 121: must be from 1 to 120, the server's --max-steps"),
    ],
)
def test_a_limit_is_one_line(visit, label, value, line):
    fill(visit.page, label, value)
    press(visit.page, "Generate")
    expect(visit.page.locator(STATUS)).to_contain_text(line)
    expect(visit.page.get_by_test_id("toast-body")).to_contain_text(line)
    assert visit.page.locator("#generate-images img").count() == 0  # nothing was drawn


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
