"""Every file of a data folder is used, or named with the reason why it is not; captions, classes and metadata in every form."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import class_folder, one_line, write_image

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_files import decode, inspect
from latentdiff.data.image_source import Columns
from latentdiff.data.sources import open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


def left_out(source) -> dict[str, list[str]]:
    return {reason: names.first for reason, names in source.report.left_out.items()}


def remarks(source) -> dict[str, list[str]]:
    return {what: names.first for what, names in source.report.remarks.items()}


def write_csv(root: Path, text: str, name: str = "metadata.csv", encoding: str = "utf-8") -> None:
    (root / name).write_bytes(text.encode(encoding))


# suffixes


def test_each_file_is_used_or_named_with_its_reason(tmp_path):
    write_image(tmp_path / "a.PNG", 1)
    for name in ("b.jfif", "c.avif", "d.webp", "e.ppm", "f.jp2", "g.gif"):
        write_image(tmp_path / name, 9, size=(16, 16))
    for name in ("x.svg", "x.pdf", "x.eps", "x.psd", "x.mp4", "x.zip", "notes.md", "nothing"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    write_image(tmp_path / "__MACOSX" / "a.png")
    write_image(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(tmp_path))
    assert source.files == ["a.PNG", "b.jfif", "c.avif", "d.webp", "e.ppm", "f.jp2", "g.gif"] and source.bad == {}
    found = left_out(source)
    assert found["hidden, or left by a system or an editor"] == [".DS_Store", ".ipynb_checkpoints/", "Thumbs.db", "__MACOSX/"]
    assert found["folder without images"] == ["empty/"] and found["broken link, or not a file"] == ["gone.png"]
    drawing = " is not read (a drawing without pixels: export it as .png)"
    assert all(found[f"suffix .{kind}{drawing}"] == [f"x.{kind}"] for kind in ("svg", "pdf", "eps"))
    assert "unpack it" in next(reason for reason in found if ".zip" in reason)
    assert found["suffix .md is not read"] == ["notes.md"] and found["no suffix, so not looked at"] == ["nothing"]
    everything = [name for names in found.values() for name in names] + source.files
    assert sorted(everything) == sorted(p.name + ("/" if p.is_dir() else "") for p in tmp_path.iterdir())


def test_a_class_folder_counts_no_checkpoints_and_names_what_is_empty(tmp_path):
    class_folder(tmp_path, 2)
    write_image(tmp_path / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "c").mkdir()
    source = open_source(str(tmp_path))
    assert source.files == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"] and source.class_names == ["a", "b"]
    assert left_out(source) == {
        "hidden, or left by a system or an editor": ["a/.ipynb_checkpoints/"],
        "folder without images": ["c/"],
    }


def test_heic_is_read_where_pillow_heif_is_and_named_where_it_is_not(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from latentdiff.data.sources import open_source\n"
        f"source = open_source({str(tmp_path)!r}); print(len(source), *source.report.lines())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "1 not used, suffix .heic is not read (install pillow-heif to read it): 1 (b.heic)\n"
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (8, 6), (200, 0, 0))).save(tmp_path / "b.heic")
    source = open_source(str(tmp_path))
    assert source.files == ["a.png", "b.heic"] and source.read(1).shape == (6, 8, 3) and source.read(1)[0, 0, 0] > 180


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n", b"%PDF-1.4\n"])
def test_no_image_starts_another_program(tmp_path, content):
    path = tmp_path / "a.png"  # a name that Pillow does not look at
    path.write_bytes(content)
    assert inspect(path) == "not a known image format"
    with pytest.raises(OSError, match="cannot identify"):
        decode(path, 3)


def test_an_empty_file_is_named_as_such_and_one_bad_file_stops_nothing(tmp_path):
    class_folder(tmp_path, 2)
    (tmp_path / "a" / "zero.png").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert source.bad == {"a/zero.png": "an empty file (0 bytes)"} and len(source) == 4
    lines = source.report.with_unreadable(source.bad).lines()
    assert lines == ["not used, cannot be read as an image: 1 (a/zero.png: an empty file (0 bytes))"]


def test_several_frames_are_said_to_be_one(tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (0, 100, 200)]
    for suffix in ("gif", "png", "tiff", "webp"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    write_image(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    moving = [f"a.{suffix}" for suffix in ("gif", "png", "tiff", "webp")]
    assert remarks(source) == {"has several frames or pages, of which the first is used": moving}
    assert (source.read(0) == 0).all()


def test_names_that_no_terminal_takes_are_written_out(tmp_path, run):
    write_image(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\x1b[31m.png")
    (tmp_path / "b\x1b.svg").write_bytes(b"x")
    write_image(tmp_path / "c.png")
    out = run("info", tmp_path)
    assert "\x1b" not in out and json.loads(out)["train"]["images"] == 2
    assert "b\\\\u001b.svg" in out


def test_links_to_class_folders_are_followed_and_deeper_ones_named(tmp_path):
    class_folder(tmp_path / "kept", 1, ("a",))
    data = class_folder(tmp_path / "data", 1, ("b",))
    (data / "a").symlink_to(tmp_path / "kept" / "a")
    (data / "b" / "circle").symlink_to(data)
    source = open_source(str(data))
    assert source.files == ["a/0.png", "b/0.png"]
    assert left_out(source) == {"link to a folder, not followed": ["b/circle/"]}


def test_what_lies_beside_train_and_test_is_named(tmp_path):
    for part in ("train", "test", "validation"):
        class_folder(tmp_path / part, 1)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    found = left_out(open_source(str(tmp_path)))
    assert found == {"lies beside train/ and test/": ["metadata.csv", "validation/"]}
    # Without test/ the others are classes, which is said
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "metadata.csv").unlink()
    assert remarks(open_source(str(tmp_path))) == {
        "read as a class; for a part of the data, name the folders train/ and test/": ["train/", "validation/"]
    }


# captions


@pytest.mark.parametrize("folder", ["", "kind/"])
def test_captions_beside_images(tmp_path, folder):
    for k, name in enumerate(("a", "b", "c", "d")):
        write_image(tmp_path / f"{folder}{name}.png", k)
    (tmp_path / f"{folder}a.txt").write_text("\ufeffa red\n apple \n")
    (tmp_path / f"{folder}b.caption").write_text("pear")
    (tmp_path / f"{folder}c.TXT").write_bytes("grün".encode("utf-16"))
    (tmp_path / f"{folder}c.caption").write_text("other")
    (tmp_path / f"{folder}readme.txt").write_text("nothing of an image")
    source = open_source(str(tmp_path))
    assert source.captions == [("a red apple",), ("pear",), ("grün",), ("",)]
    assert source.class_names == (["kind"] if folder else [])
    assert remarks(source) == {"no caption, used with an empty one": [f"{folder}d.png"]}
    assert left_out(source) == {
        ".txt beside it is read instead": [f"{folder}c.caption"],
        "text beside no image": [f"{folder}readme.txt"],
    }
    before = source.fingerprint()
    (tmp_path / f"{folder}b.caption").write_text("plum")
    assert open_source(str(tmp_path)).fingerprint() != before


def test_captions_that_are_not_text_are_refused_by_name(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="a.txt: not UTF-8 text .*save it as UTF-8") as error:
        open_source(str(tmp_path))
    one_line(error)
    (tmp_path / "a.txt").write_text("  \n")
    source = open_source(str(tmp_path))
    assert source.captions is None


def test_captions_are_found_in_their_usual_columns_and_in_a_named_one(tmp_path):
    for k in range(2):
        write_image(tmp_path / f"{k}.png", k)
    write_csv(tmp_path, "file_name,caption,artist\n1.png,one,x\n0.png,zero,y\n")
    source = open_source(str(tmp_path))
    assert source.captions == [("zero",), ("one",)]
    assert remarks(source) == {"column of metadata.csv that is not used": ["artist"]}
    named = open_source(str(tmp_path), columns=Columns(text="artist", label="caption"))
    assert named.captions == [("y",), ("x",)] and named.class_names == ["one", "zero"]
    assert remarks(named) == {}
    with pytest.raises(UserError, match="text_column title is not a column; the columns are file_name, caption, artist"):
        open_source(str(tmp_path), columns=Columns(text="title"))
    write_csv(tmp_path, "picture;caption\n1.png;one, two\n0.png;zero\n", encoding="utf-8-sig")
    other = open_source(str(tmp_path), columns=Columns(image="picture"))
    assert other.files == ["0.png", "1.png"] and other.captions == [("zero",), ("one, two",)]
    with pytest.raises(UserError, match="metadata.csv: has no column file_name, only picture, caption; data.image_column"):
        open_source(str(tmp_path))


def test_captions_that_earlier_versions_did_not_read_leave_their_latent_caches_valid(tmp_path):
    write_image(tmp_path / "a.png", 1)
    dataset = ImageDataset(open_source(str(tmp_path)), Preprocess())
    plain, content = dataset.latents_fingerprint(), dataset.fingerprint()
    assert plain == content
    (tmp_path / "a.txt").write_text("beside")
    dataset = ImageDataset(open_source(str(tmp_path)), Preprocess())
    assert dataset.latents_fingerprint() == plain and dataset.fingerprint() != content
    for column, same in (("caption", True), ("text", False)):
        write_csv(tmp_path, f"file_name,{column}\na.png,listed\n")
        dataset = ImageDataset(open_source(str(tmp_path)), Preprocess())
        assert (dataset.latents_fingerprint() == plain) is same and dataset.fingerprint() != content


# metadata


def test_images_that_metadata_does_not_list_are_named(tmp_path):
    for k in range(5):
        write_image(tmp_path / f"{k}.png", k)
    write_image(tmp_path / "strange.data.png", 7).rename(tmp_path / "strange.data")
    (tmp_path / "4.txt").write_text("beside")
    write_csv(tmp_path, "file_name,text\r\n0.png,zero\r\nstrange.data,listed whatever its suffix\r\n0.png,again\r\n")
    (tmp_path / "metadata.jsonl").write_text("")
    (tmp_path / "metadata.jsonl").unlink()
    source = open_source(str(tmp_path))
    assert source.files == ["0.png", "0.png", "strange.data"] and int(source.read(2)[0, 0, 0]) == 7
    assert left_out(source) == {
        "not listed in metadata.csv": ["1.png", "2.png", "3.png", "4.png"],
        "metadata.csv is read instead": ["4.txt"],
    }
    assert remarks(source) == {"listed more than once in metadata.csv, and counted as often": ["0.png"]}
    (tmp_path / "metadata.jsonl").write_text('\ufeff{"file_name": "./0.png"}\r\n')
    both = open_source(str(tmp_path))
    assert both.files == ["./0.png"] and left_out(both)["metadata.jsonl is read instead"] == ["metadata.csv", "4.txt"]
    assert "0.png" not in left_out(both)["not listed in metadata.jsonl"]


@pytest.mark.parametrize(
    "text, said",
    [
        ('file_name,text\n0.png,"zero\n1.png,one\n2.png,two\n', "metadata.csv line 2: .*quote opened there and not closed"),
        ('file_name,text\n0.png,zero\n1.png,"one\n2.png,"two"\n', "metadata.csv line 3: .*quote"),
        ('file_name,text\n0.png,"zero\n1.png,one\n2.png,two"\n', r"metadata.csv line 2: a quote .*\(1.png\)"),
        ("file_name,text\n0.png,a dog, big\n", "line 2: has 3 values and the header 2 columns; put double quotes"),
        ("file_name,text\n0.png,zero\n1.png\n", "line 3: has no text although other lines do"),
    ],
)
def test_a_csv_whose_quotes_or_commas_are_wrong_names_the_line(tmp_path, text, said):
    for k in range(3):
        write_image(tmp_path / f"{k}.png", k)
    write_csv(tmp_path, text)
    with pytest.raises(UserError, match=said) as error:
        open_source(str(tmp_path))
    one_line(error)


def test_a_text_of_several_lines_in_quotes_is_one_caption(tmp_path):
    write_image(tmp_path / "0.png")
    write_csv(tmp_path, 'file_name,text\n0.png,"first\nsecond, ""third"""\n')
    assert open_source(str(tmp_path)).captions == [('first\nsecond, "third"',)]


def test_file_names_of_other_systems_find_their_files(tmp_path):
    name = "caf\u00e9.png"
    write_image(tmp_path / "sub" / unicodedata.normalize("NFD", name))
    write_image(tmp_path / "sub" / "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": file}) + "\n" for file in (f"sub/{name}", "sub\\b.png"))
    )
    source = open_source(str(tmp_path))
    assert len(source) == 2 and source.bad == {} and left_out(source) == {}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "..\\\\b.png"}\n')
    with pytest.raises(UserError, match="not inside"):
        open_source(str(tmp_path))


# classes


def test_the_order_of_classes_does_not_depend_on_pythons_hash_seed(tmp_path):
    names = ("1", "01", "001", "2", "02", "10", "\u0661")  # the last is a 1 too, in Arabic digits
    class_folder(tmp_path, 1, names)
    program = f"from latentdiff.data.sources import open_source; print(open_source({str(tmp_path)!r}).class_names)"
    found = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"}
        out = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True, env=environment
        )
        found.add(out.stdout)
    assert found == {"['1', '\u0661', '01', '001', '2', '02', '10']\n"}


# tables and shards


def test_tables_name_other_columns_rows_without_image_and_images_beside_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = BytesIO()
    Image.new("L", (4, 4)).save(content, "PNG")
    rows = {"image": [{"bytes": content.getvalue()}, None], "label": [0, 1], "score": [0.5, 1.0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    write_image(tmp_path / "beside.png")
    source = open_source(str(tmp_path))
    assert remarks(source) == {"column that is not used": ["score"]} and source.bad == {"row 1": "the row has no image"}
    assert left_out(source) == {"lies in a folder of tables, which are read instead": ["beside.png"]}


def test_a_shards_sample_of_a_kind_that_is_not_read_is_named(tmp_path):
    from test_webdataset import png, write_tar

    data = str(write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"zero", "1.svg": b"<svg/>", "1.txt": b"one"}))
    source = open_source(data)
    assert len(source) == 1 and source.captions == [("zero",)]
    assert source.bad == {"a.tar/1.svg": "suffix .svg is not read (a drawing without pixels: export it as .png)"}


def test_no_file_of_a_folder_without_images_is_passed_over(tmp_path):
    (tmp_path / "a.svg").write_bytes(b"x")
    with pytest.raises(UserError, match="has no images .*suffix .svg is not read .*: a.svg") as error:
        open_source(str(tmp_path))
    one_line(error)


def test_transparency_lies_on_the_background_asked_for(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    white, red = open_source(str(tmp_path)), open_source(str(tmp_path), background=(255, 0, 0))
    assert np.unique(white.read(0)).tolist() == [255] and red.read(0)[0, 0].tolist() == [255, 0, 0]
    assert white.fingerprint() != red.fingerprint()
    assert open_source(str(tmp_path), channels=1, background=(255, 0, 0)).read(0)[0, 0, 0] == 76  # the luma of red
