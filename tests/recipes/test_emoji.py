"""The emoji data set: what is written, the captions, which pairs are held out, and every refusal in one line."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_emoji import package, picture_name, tarball
from tiny_runs import tree

from latentdiff.errors import UserError
from latentdiff.recipes.emoji import prepare as module
from latentdiff.recipes.emoji.captions import captions, clean_name, words
from latentdiff.recipes.emoji.prepare import prepare_emoji

OTHER = {"noto": "twemoji", "twemoji": "noto"}


@pytest.fixture
def tarballs(tmp_path) -> list[Path]:
    names = ["emojibase-data", "emoji-datasource-twitter", "emoji-datasource-google"]
    return [tarball(tmp_path / f"{i}.tgz", package(name)) for i, name in enumerate(names)]


def rows(out: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (out / part / "metadata.jsonl").read_text().splitlines()]


def written(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): content for path, content in tree(out).items()}


def texts(out: Path, identity: str) -> list[str]:
    (row,) = [r for part in ("train", "test") for r in rows(out, part) if (r["identity"], r["style"]) == (identity, "noto")]
    return row["text"]


def edited(path: Path, change) -> Path:
    """A tarball written again after `change` altered {name: content} in place."""
    with tarfile.open(path) as tar:
        members = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar}
    change(members)
    return tarball(path, members)


def test_counts_and_files(tarballs, tmp_path):
    facts = prepare_emoji(tmp_path / "out", tarballs, held_out=0.25)
    assert (facts["emoji"], facts["pictures"], facts["train"], facts["test"]) == (13, 26, 20, 6)
    assert facts["held_out"] == {"noto": 3, "twemoji": 3}
    for part, count in (("train", 20), ("test", 6)):
        listed = [row["file_name"] for row in rows(tmp_path / "out", part)]
        on_disk = [p.relative_to(tmp_path / "out" / part).as_posix() for p in (tmp_path / "out" / part).rglob("*.png")]
        assert len(listed) == count and sorted(on_disk) == sorted(set(listed)) == listed
    assert facts["captions"] == sum(len(r["text"]) for part in ("train", "test") for r in rows(tmp_path / "out", part))
    texts = [text for r in rows(tmp_path / "out", "train") for text in r["text"]]
    assert facts["caption_tokens"]["captions"] == len(texts) and facts["caption_tokens"]["limit"] == 32
    assert facts["caption_tokens"]["longest_caption"] in texts and facts["caption_tokens"]["cut"] == 0
    assert facts["packages"]["emojibase-data"] == "1.2.3"
    assert sum(facts["groups"].values()) == 13 and facts["groups"]["food & drink"] == 2 and facts["groups"]["misc"] == 1
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(word in readme for word in ("20 pictures", "1.2.3", "Apache-2.0", "CC-BY 4.0", "MIT"))


def test_a_row_says_what_the_picture_is(tarballs, tmp_path):
    prepare_emoji(tmp_path / "out", tarballs)
    every = {row["file_name"]: row for part in ("train", "test") for row in rows(tmp_path / "out", part)}
    row = every["twemoji/1f34e.png"]
    assert {k: v for k, v in row.items() if k != "text"} == {
        "file_name": "twemoji/1f34e.png",
        "style": "twemoji",
        "identity": "1F34E",
        "name": "red apple",
        "group": "food & drink",
        "tags": ["apple", "fruit", "red"],
    }
    assert every["noto/0031-fe0f-20e3.png"]["name"] == "keycap 1"  # emojibase writes it without FE0F
    assert every["noto/1f499.png"]["name"] == "blue heart"  # and this one with
    assert every["noto/1f6f8.png"]["name"] == "flying saucer"  # emojibase has none: emoji-data's name
    assert "noto/1fae0.png" not in every


def test_pictures_are_rgb_on_white(tarballs, tmp_path):
    prepare_emoji(tmp_path / "out", tarballs)
    for style, green in (("noto", 100), ("twemoji", 200)):
        (path,) = (tmp_path / "out").glob(f"*/{style}/1f436.png")
        picture = Image.open(path)
        assert picture.mode == "RGB" and picture.size == (64, 64)
        pixels = np.asarray(picture)
        assert (pixels[:, :20] == (20, green, 7)).all() and (pixels[:, 40:] == 255).all()
        middle = np.array([20, green, 7]) * 128 / 255 + 255 * 127 / 255
        assert np.abs(pixels[:, 20:40] - middle).max() <= 1


def test_captions_name_the_thing_as_people_type_it(tarballs, tmp_path):
    prepare_emoji(tmp_path / "out", tarballs)
    apple = texts(tmp_path / "out", "1F34E")
    wanted = ["red apple", "a red apple", "apple", "noto style, red apple", "red apple, noto style"]
    assert set(wanted + ["noto emoji of a red apple", "noto style, apple"]) <= set(apple)
    for identity, typed in [("1F415", "dog"), ("1F436", "dog"), ("1F355", "pizza"), ("1F680", "a rocket")]:
        assert typed in texts(tmp_path / "out", identity)
    assert "grinning face" in texts(tmp_path / "out", "1F600") and "blue heart" in texts(tmp_path / "out", "1F499")
    assert "dog2" not in str(texts(tmp_path / "out", "1F415"))
    thumbs = texts(tmp_path / "out", "1F44D")
    assert {"thumbs up", "+1", "thumbsup"} <= set(thumbs) and not any("a thumbs" in text for text in thumbs)
    flag = texts(tmp_path / "out", "1F1EA-1F1EC")
    assert {"flag of egypt", "the flag of egypt", "egypt flag", "flag eg"} <= set(flag)
    assert not any("eg" in text.split(", ") for text in flag)


def test_every_picture_has_captions_with_and_without_its_style(tarballs, tmp_path):
    prepare_emoji(tmp_path / "out", tarballs)
    for row in rows(tmp_path / "out", "train") + rows(tmp_path / "out", "test"):
        named = sum(row["style"] in text for text in row["text"])
        assert 2 * named >= len(row["text"]) == len(set(row["text"])) >= 7 and len(row["text"]) - named >= 3
        assert not any(OTHER[row["style"]] in text or text != text.lower() for text in row["text"])


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("flag: Egypt", "flag of egypt"),
        ("flag: Myanmar (Burma)", "flag of myanmar"),
        ("flag: Bosnia & Herzegovina", "flag of bosnia and herzegovina"),
        ("keycap: #", "keycap #"),
        ("man: bald", "bald man"),
        ("person: red hair", "person with red hair"),
        ("family: man, woman, boy, girl", "family of man, woman, boy and girl"),
        ("couple with heart: man, man", "couple with heart, man and man"),
        ("woman running: facing right", "woman running facing right"),
        ("Japanese “here” button", "japanese here button"),
        ("A button (blood type)", "a button, blood type"),
        ("men’s room", "men's room"),
        ("ON! arrow", "on arrow"),
    ],
)
def test_names_are_cleaned(label, name):
    assert clean_name(label) == name


@pytest.mark.parametrize(
    ("label", "group", "phrase"),
    [
        ("unicorn", "animals", "a unicorn"),
        ("octopus", "animals", "an octopus"),
        ("hourglass done", "travel", "an hourglass done"),
        ("cherries", "food", "cherries"),
        ("cooked rice", "food", "cooked rice"),
        ("nest with eggs", "animals", "a nest with eggs"),
        ("one o’clock", "travel", "one o'clock"),
        ("person frowning", "people & body", "a person frowning"),
        ("rolling on the floor laughing", "smileys", "rolling on the floor laughing"),
        ("Santa Claus", "people & body", "santa claus"),
        ("no smoking", "symbols", "no smoking"),
        ("radioactive", "symbols", "radioactive"),
        ("peace symbol", "symbols", "a peace symbol"),
    ],
)
def test_articles(label, group, phrase):
    assert words(label, [], [], group).phrase == phrase


def test_short_names_that_are_no_words_are_left_out():
    assert words("one o'clock", [], ["clock1"], "travel").aliases == []
    assert words("button", [], ["u7121", "8ball", "point_up_2"], "symbols").aliases == ["8ball", "point up"]
    assert words("piñata", [], [], "activities").aliases == ["pinata"]


def test_captions_depend_on_seed_style_and_emoji_alone():
    many = words("red apple", [f"tag{i}" for i in range(30)], [], "food")
    one = captions(many, "noto", 0, "1F34E")
    assert one == captions(many, "noto", 0, "1F34E")
    assert one != captions(many, "noto", 1, "1F34E") and one != captions(many, "noto", 0, "1F34F")
    assert [text.replace("noto", "twemoji") for text in one] != captions(many, "twemoji", 0, "1F34E")
    counts = [len(captions(many, "noto", seed, "1F34E")[-1].split(", ")) - 1 for seed in range(40)]
    assert set(counts) == {1, 2, 3}


def test_the_same_seed_writes_the_same_bytes(tarballs, tmp_path):
    for name, order, seed in (("a", tarballs, 3), ("b", tarballs[::-1], 3), ("c", tarballs, 4)):
        prepare_emoji(tmp_path / name, order, seed=seed)
    assert written(tmp_path / "a") == written(tmp_path / "b") != written(tmp_path / "c")
    assert [r["file_name"] for r in rows(tmp_path / "a", "test")] != [r["file_name"] for r in rows(tmp_path / "c", "test")]


@pytest.mark.parametrize("seed", range(4))
def test_a_held_out_pair_is_in_test_alone_and_its_other_style_in_train(tarballs, tmp_path, seed):
    prepare_emoji(tmp_path / "out", tarballs, seed=seed, held_out=0.45)
    train, test = ({(r["style"], r["identity"]) for r in rows(tmp_path / "out", part)} for part in ("train", "test"))
    assert len(test) == 12 and len(train) == 14 and not train & test
    assert sum(style == "noto" for style, _ in test) == 6
    assert all((OTHER[style], identity) in train for style, identity in test)
    for style, identity in test:
        assert not (tmp_path / "out" / "train" / style / picture_name(identity)).exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_picture_that_two_emoji_share_is_never_held_out(tarballs, tmp_path, seed):
    """Held out under one name, it would be in train/ under the other."""

    def share(members):
        members["img/twitter/64/1f355.png"] = members["img/twitter/64/1f680.png"]

    edited(tarballs[1], share)
    prepare_emoji(tmp_path / "out", tarballs, seed=seed, held_out=0.42)  # 11 pairs: each emoji that can be
    test = {r["identity"] for r in rows(tmp_path / "out", "test")}
    assert len(test) == 11 and not test & {"1F355", "1F680"}
    with pytest.raises(UserError, match="--held-out 0.5: .*13 pairs.*11 emoji"):
        prepare_emoji(tmp_path / "more", tarballs, seed=seed, held_out=0.5)


# refusals


@pytest.fixture
def refusal(refused, tarballs):
    """The one line of `prepare emoji --out out` over the tarballs, and options; nothing is left behind."""

    def call(*options, files=tarballs) -> str:
        return refused("prepare", "emoji", "--out", "out", "--tarballs", *files, *options)

    return call


def test_the_command_prints_the_facts(run, here, tarballs):
    facts = json.loads(run("prepare", "emoji", "--out", "a/out", "--tarballs", *tarballs, "--held-out", "0.1", "--seed", 5))
    assert facts["out"] == "a/out" and facts["test"] == 3 and facts["seed"] == 5
    assert sorted(p.name for p in (here / "a").iterdir()) == ["out"]  # no temporary folder stays
    assert sorted(p.name for p in (here / "a" / "out").iterdir()) == ["README.md", "test", "train"]


def test_an_empty_folder_is_taken_and_a_full_one_refused(run, here, refusal, tarballs):
    (here / "out").mkdir()
    run("prepare", "emoji", "--out", "out", "--tarballs", *tarballs)
    assert len(rows(here / "out", "test")) == 2  # at least one a style
    assert "--out out: exists and is not an empty folder" in refusal()


def test_an_unknown_name_is_refused(refused):
    assert "'emojis'" in refused("prepare", "emojis", "--out", "out")


@pytest.mark.parametrize("share", ["0", "0.6", "nan", "-1"])
def test_a_share_that_cannot_be_held_out_is_refused(refusal, share):
    assert f"--held-out {share}" in refusal(f"--held-out={share}")


@pytest.mark.parametrize("left_out", range(3))
def test_a_missing_package_is_named(refusal, tarballs, left_out):
    name = ["emojibase-data", "emoji-datasource-twitter", "emoji-datasource-google"][left_out]
    files = [path for i, path in enumerate(tarballs) if i != left_out]
    assert f"no file of the package {name} was given" in refusal(files=files)


def test_a_foreign_package_and_a_second_copy_are_named(refusal, tarballs, tmp_path):
    other = tarball(tmp_path / "left-pad.tgz", {"package.json": b'{"name": "left-pad"}'})
    assert "left-pad.tgz" in (line := refusal(files=[*tarballs, other])) and "emojibase-data" in line
    copy = tarball(tmp_path / "copy.tgz", package("emojibase-data"))
    assert "copy.tgz: is emojibase-data" in refusal(files=[*tarballs, copy])


@pytest.mark.parametrize(
    ("which", "member"),
    [(0, "en/data.json"), (0, "en/messages.json"), (0, "package.json"), (1, "img/twitter/64/1f34e.png"), (2, "emoji.json")],
)
def test_a_missing_member_is_named(refusal, tarballs, which, member):
    edited(tarballs[which], lambda members: members.pop(member))
    assert f"{which}.tgz: has no package/{member}" in refusal()


def test_damage_is_named(refusal, tarballs, tmp_path):
    assert "nowhere.tgz: no such file" in refusal(files=[tmp_path / "nowhere.tgz"])
    whole = tarballs[1].read_bytes()
    for cut in (whole[: len(whole) // 2], b"not a tarball", b""):
        tarballs[1].write_bytes(cut)
        assert "1.tgz: not a whole .tgz file" in refusal()
    tarballs[1].write_bytes(whole)
    picture = "img/twitter/64/1f436.png"
    edited(tarballs[1], lambda members: members.update({picture: members[picture][:90]}))
    assert f"1.tgz: package/{picture} cannot be read as an image" in refusal()
    edited(tarballs[1], lambda members: members.update({picture: small_png()}))
    assert f"1.tgz: package/{picture} is 8x8 pixels, not 64x64" in refusal()


def small_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(stream, "png")
    return stream.getvalue()


def test_a_list_of_another_layout_is_refused(refusal, tarballs):
    whole = tarballs[2].read_bytes()
    for content, said in [(b"{", "emoji.json is not JSON"), (b'[{"a": 1}]', "not laid out"), (b"[]", "at least 2")]:
        edited(tarballs[2], lambda members, content=content: members.update({"emoji.json": content}))
        assert said in refusal()
    tarballs[2].write_bytes(whole)
    outside = package("emoji-datasource-google")["emoji.json"].replace(b"1f34e.png", b"../../1f34e.png")
    edited(tarballs[2], lambda members: members.update({"emoji.json": outside}))
    assert "'../../1f34e.png'" in refusal()


# npm


def test_without_tarballs_npm_fetches_the_pinned_versions(tarballs, tmp_path, monkeypatch, capsys):
    asked = []

    def pack(command, cwd, **_):
        asked.append(command[2])
        name = command[2].rpartition("@")[0]
        tarball(Path(cwd) / f"{name}.tgz", package(name))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module.subprocess, "run", pack)
    prepare_emoji(tmp_path / "fetched")
    assert asked == ["emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "emojibase-data@17.0.0"]
    prepare_emoji(tmp_path / "given", tarballs)
    assert written(tmp_path / "fetched") == written(tmp_path / "given")
    assert capsys.readouterr().err.count("fetching") == 3


def test_npm_missing_or_failing_is_said_in_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    line = refused("prepare", "emoji", "--out", "out")
    assert "npm is not installed" in line and "--tarballs" in line and "emojibase-data@17.0.0" in line
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error no network\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="emoji-datasource-google@16.0.0 failed .npm error no network"):
        prepare_emoji(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_or_a_kill_leaves_no_half_data_set(tarballs, tmp_path, monkeypatch):
    def full(folder, *args):
        (folder / "half.png").write_bytes(b"")
        raise OSError(28, "No space left on device")

    place = tmp_path / "place"
    (place / ".emoji.new-01234567").mkdir(parents=True)  # what a kill leaves
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", full)
        with pytest.raises(UserError, match=r"emoji: cannot be written \(No space left on device\)"):
            prepare_emoji(place / "emoji", tarballs)
    assert list(place.iterdir()) == []
    prepare_emoji(place / "emoji", tarballs)
    assert [path.name for path in place.iterdir()] == ["emoji"]
