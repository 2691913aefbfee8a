"""The tab Measure: records side by side, and cards in which nothing is active."""

import copy
import json
import time
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.evaluation.records import EVALUATE_PROTOCOL, compare_records
from latentdiff.web import measure
from latentdiff.web.work import Work

SECRET = "a word that stands outside"
SHIPPED = Path(__file__).parents[2] / "weights" / "fashion-mnist"
RECORD = {
    "format": 1,
    "kind": "evaluate",
    "protocol": {**dict.fromkeys(EVALUATE_PROTOCOL), "images": 100, "prompts": {}},
    "made": {"model": "mine", "data": "/home/somebody/pictures", "versions": {"latentdiff": "1"}},
    "values": {"frechet[net]": {"value": 3.5, "floor": 1.0, "images": 100}},
}


def write_record(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({**RECORD, **changes}))
    return folder


def write_model(folder: Path, card: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text(card)
    return folder


def listed(root: Path) -> measure.Listed:
    return measure.Listed({"fashion-mnist": SHIPPED}, root)


def clean(text: str) -> str:
    return Work(None).without_paths(text)


def test_records_stand_side_by_side_as_the_command_puts_them(tmp_path):
    other = {"frechet[net]": {"value": 2.5, "floor": 1.0, "images": 100}}
    paths = [write_record(tmp_path / "a" / "report"), write_record(tmp_path / "b" / "report", values=other)]
    places = listed(tmp_path).records()
    assert list(places) == ["a/report", "b/report"]
    made = measure.compare(["b/report", "a/report"], places, clean)
    expected = compare_records([paths[1], paths[0]])
    for path, name in zip(paths, places, strict=True):
        expected = expected.replace(str(path), name)
    assert made == expected.replace("/home/somebody/pictures", "pictures")
    assert "| frechet[net] | 2.5000 | 3.5000 | 1.0000 |" in made and str(tmp_path) not in made
    assert "3.5000" in measure.compare(["a/report"], places, clean)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "0 are chosen"),
        (["a"] * 2 + list("bcdefghi"), "9 are chosen"),
        (["nothing"], "'nothing': there is none"),
        ([["a"]], "there is none of this name"),
        (["../a"], "there is none"),
        (["a", "unlike"], "images is 100 in a and 7 in unlike"),
        (["damaged"], "damaged: not JSON"),
        (["odd"], "odd: not what latentdiff evaluate writes"),
        (["large"], "large: its metrics.json cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, names, words):
    for name in "abcdefghi":
        write_record(tmp_path / name)
    write_record(tmp_path / "unlike", protocol={**RECORD["protocol"], "images": 7})
    write_record(tmp_path / "odd", made={"versions": 3})
    write_record(tmp_path / "large")
    with (tmp_path / "large" / "metrics.json").open("ab") as file:
        file.truncate(measure.MOST_RECORD + 1)
    write_record(tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").write_bytes(b"[" * 10**5)
    names = [tuple(name) if isinstance(name, list) else name for name in names]
    with pytest.raises(UserError, match=words) as error:
        measure.compare(names, listed(tmp_path).records(), clean)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_links_are_neither_listed_nor_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    write_record(outside / "record", made={"data": SECRET, "versions": {}})
    write_model(outside / "model", SECRET)
    Image.new("RGB", (8, 8)).save(outside / "picture.png")
    model = write_model(root / "mine", f"![{SECRET[:6]}](inside.png) ![no](link.png) ![no](../../outside/picture.png) ![no]")
    Image.new("RGB", (8, 8)).save(model / "inside.png")
    (model / "link.png").symlink_to(outside / "picture.png")
    (root / "record").symlink_to(outside / "record")
    (root / "model").symlink_to(outside / "model")
    write_record(root / "late")
    places = listed(root)
    assert list(places.records()) == ["late"] and list(places.cards()) == ["fashion-mnist", "mine"]
    made = measure.card("mine", places.cards(), clean)
    assert made.count("<img") == 1 and made.count("[no]") == 3

    # A file that becomes a link after it was listed
    (root / "late" / "metrics.json").unlink()
    (root / "late" / "metrics.json").symlink_to(outside / "record" / "metrics.json")
    (model / "README.md").unlink()
    (model / "README.md").symlink_to(outside / "model" / "README.md")
    with pytest.raises(UserError, match="cannot be read"):
        measure.compare(["late"], places.records(), clean)
    with pytest.raises(UserError, match="it has no README.md that can be shown"):
        measure.card("mine", places.cards(), clean)


def test_a_shipped_card_is_shown_with_its_pictures():
    made = measure.card("fashion-mnist", listed(SHIPPED.parent / "none").cards(), clean)
    assert made.count('<img src="data:image/') == 5 and "<table>" in made and "&lt;!--" not in made
    assert "frechet" in made and "library_name" not in made  # without the front matter


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick='alert(1)'>b</b>",
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a](data:text/html,<script>alert(1)</script>)",
        "[a](/gradio_api/file=/etc/passwd)",
        "[a](vbscript:x) <javascript:alert(1)>",
        "![a](https://elsewhere.example/tracks.png)",
        "![a](//elsewhere.example/tracks.png)",
        "![a](/etc/passwd) ![a](data:image/svg+xml;base64,PHN2Zz4=)",
        '![a](x.png "onload=alert(1)")',
        "[a]: javascript:alert(1)\n\n[a] ![a]",
        "| a |\n|---|\n| <script>alert(1)</script> |",
        "```html\n<script>alert(1)</script>\n```",
        "&lt;script&gt; &#60;script&#62;alert(1)",
        "<!-- <script>alert(1)</script>",
        "</div></div><style>*{display:none}</style>",
    ],
)
def test_nothing_in_a_card_is_active_or_asked_for_elsewhere(text):
    made = measure.render(measure.without_comments(text))
    shown = made.lower()
    for bad in ("<script", "<img", "<style", "<b ", 'href="javascript', 'href="data', 'href="vbscript', 'href="/', 'src="'):
        assert bad not in shown
    assert measure.render("[a](https://example.org)").count('href="https://example.org"') == 1


def test_no_card_takes_long(tmp_path):
    for text in ("![[[", "<!--", "* a\n  "):
        start = time.process_time()
        measure.render(measure.without_comments((text * measure.MOST_CARD)[: measure.MOST_CARD]))
        assert time.process_time() - start < 5
    many = write_model(tmp_path / "many", "![a](p.png)\n" * 200)
    Image.new("L", (8, 8)).save(many / "p.png")
    made = measure.card("many", listed(tmp_path).cards(), clean)
    assert made.count("<img") == measure.MOST_PICTURES


def test_records_and_cards_in_the_browser(visit, runs_folder):
    page = visit.page
    values = copy.deepcopy(RECORD["values"])
    values["frechet[net]"]["value"] = 2.25
    write_record(runs_folder / "first")
    write_record(runs_folder / "second", values=values, made={**RECORD["made"], "model": "${alert(1)}{{value}}<img src=x>"})
    time.sleep(measure.LIST_PERIOD)
    page.get_by_role("tab", name="Measure").click()
    page.get_by_label("Records").first.click()
    page.get_by_role("option", name="first").click()
    page.get_by_role("option", name="second").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("cell", name="2.2500").wait_for()
    assert page.get_by_role("cell", name="${alert(1)}{{value}}<img src=x>").is_visible()
    page.get_by_label("Model card").first.click()
    page.get_by_role("option", name="fashion-mnist").click()
    picture = page.get_by_alt_text("ten classes, eight images each")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth > 100)")
