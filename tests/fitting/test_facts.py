"""What a fit finds out about a folder, and what it makes of the odd ones."""

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.fitting.facts import Facts, look


def picture(path, size=(40, 40), seed=0, colour=None, clear=False, grey=False):
    """A PNG of size (width, height): noise, or one colour; clear: a small square of it on a transparent ground."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    if grey:
        pixels[:] = pixels[..., :1]
    if clear:
        alpha = np.zeros((size[1], size[0], 1), np.uint8)
        alpha[10:30, 10:30] = 255
        pixels = np.concatenate([pixels, alpha], -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_white_icons_are_seen_to_vanish_on_white(tmp_path):
    for i in range(8):
        colour = (250 - i, 250, 250) if i < 2 else (20 * i, 30, 200)
        picture(tmp_path / "icons" / f"{i}.png", colour=colour, clear=True)
    facts = look(str(tmp_path / "icons"))
    assert facts.transparent == 1.0 and facts.hidden == {"white": 0.25, "black": 0.0, "grey": 0.0}


def test_opaque_alpha_is_no_transparency(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((20, 20, 4), 255, np.uint8) - np.uint8([i, 9, 9, 0])).save(tmp_path / f"{i}.png")
    assert look(str(tmp_path)).transparent == 0.0


def test_classes_captions_both_and_neither(tmp_path):
    for kind in ("neither", "class", "text", "class+text"):
        for i in range(4):
            inside = f"c{i % 2}/" if "class" in kind else ""
            file = picture(tmp_path / kind / f"{inside}{i}.png", seed=i)
            if "text" in kind and i < 3:
                file.with_suffix(".txt").write_text(f"picture {i}")
        found = look(str(tmp_path / kind))
        assert found.condition == kind.replace("neither", "none")
        assert (found.captions or {}).get("without") == (1 if "text" in kind else None)


def test_one_class_alone_and_classes_of_one_picture_condition_nothing():
    assert Facts("x", 5, classes={"a": 5}).condition == "none"
    assert Facts("x", 3, classes={"a": 1, "b": 1, "c": 1}).condition == "none"
    assert Facts("x", 5, classes={"a": 3, "b": 2}).condition == "class"


def test_copies_are_found_also_across_classes(tmp_path):
    for name, seed in (("a/1", 1), ("a/2", 1), ("b/3", 1), ("b/4", 2)):
        picture(tmp_path / f"{name}.png", seed=seed)
    facts = look(str(tmp_path))
    assert (facts.duplicates, facts.duplicates_across) == (2, 1)
    assert any("copies of another" in line for line in facts.lines())


def test_a_broken_picture_is_named_and_left_out(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i:02d}.png", seed=i, size=(16, 9))
    (tmp_path / "03.png").write_bytes(b"broken")
    facts = look(str(tmp_path))
    assert facts.images == 11 and list(facts.unreadable) == ["03.png"]
    assert any("03.png" in line for line in facts.lines())


def test_few_pictures_get_their_verdict(tmp_path):
    assert "too few to generalise" in Facts("x", 3).verdict()
    assert "few" in Facts("x", 600).verdict() and "too few" not in Facts("x", 600).verdict()
    assert "enough" in Facts("x", 20_000).verdict()


def test_empty_single_and_mostly_broken_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "one" / "1.png")
    for i in range(4):
        (picture(tmp_path / "broken" / f"{i}.png")).write_bytes(b"no picture" if i else b"")
    cases = {"empty": "no images", "one": "one picture", "broken": "cannot be read", "none": "no such folder"}
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            look(str(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_words_of_sides_are_seen(tmp_path):
    for name in ("go-left", "go-up"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png", seed=i)
    assert look(str(tmp_path)).sided
    (tmp_path / "go-left").rename(tmp_path / "gold")
    assert not look(str(tmp_path)).sided
