"""What others give is data, never code: no pickle, no remote code, no path out of a folder, no bomb."""

import ast
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import torch
from hostile import write_checkpoint
from PIL import Image
from tiny_emoji import package, tarball
from tiny_stable import change_json

from latentdiff import checkpoints
from latentdiff.config import load_config
from latentdiff.data.image_files import decode, inspect, read_idx
from latentdiff.data.pairs import read_pairs
from latentdiff.data.sources import open_source
from latentdiff.errors import UserError
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.recipes.emoji.prepare import prepare_emoji

ROOT = Path(__file__).parents[2]
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins.eval",
    "builtins.exec",
    "runpy.run_path",
}
# The page's two processes send each other objects through two pipes that no one else can write to. What visitors send is text,
# and the names of their uploaded files, within these objects
PIPES = {"latentdiff/web/worker.py": "imports pickle", "latentdiff/web/jobs/process.py": "imports pickle"}
FILES = [*(ROOT / "latentdiff").rglob("*.py"), *(ROOT / "pipelines").glob("*.py"), *(ROOT / "weights").rglob("*.py")]


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of a name with its attributes; "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """What in a file could run code that lies in data, as text with its line."""
    found, tree, names = [], ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            for alias in node.names:
                whole = base + alias.name
                names[alias.asname or alias.name.split(".")[0]] = whole if alias.asname or base else whole.split(".")[0]
                if whole.split(".")[0] in PICKLING:
                    found.append(f"{node.lineno}: imports {whole}")
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, _, rest = dotted(node.func).partition(".")
        called = ".".join(part for part in (names.get(first, first), rest) if part)
        keywords = {k.arg: k.value for k in node.keywords}
        tensors_alone = called == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is True
        if called in CALLS and not tensors_alone:
            found.append(f"{node.lineno}: {called}")
        for name in ("allow_pickle", "shell", "trust_remote_code"):
            if name in keywords and not (isinstance(keywords[name], ast.Constant) and keywords[name].value is False):
                found.append(f"{node.lineno}: {name}")
        if keywords.get("use_safetensors") is not None and getattr(keywords["use_safetensors"], "value", None) is not True:
            found.append(f"{node.lineno}: use_safetensors")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_can_run_code_that_lies_in_data(path):
    allowed = PIPES.get(path.relative_to(ROOT).as_posix())
    assert [line for line in offences(path.read_text()) if line.partition(": ")[2] != allowed] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import pickle", "1: imports pickle"),
        ("def f():\n    from joblib import load", "2: imports joblib.load"),
        ("import dill as x", "1: imports dill"),
        ("import shelve, os", "1: imports shelve"),
        ("import torch\ntorch.load(p)", "2: torch.load"),
        ("from torch import load as take\ntake(p)", "2: torch.load"),
        ("import torch\ntorch.load(p, weights_only=False)", "2: torch.load"),
        ("import torch\ntorch.load(p, weights_only=safe)", "2: torch.load"),
        ("import torch as t\nt.save(a, p)", "2: torch.save"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "2: allow_pickle"),
        ("np.load(p, allow_pickle=flag)", "1: allow_pickle"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "2: yaml.load"),
        ("eval('1')", "1: eval"),
        ("exec(code)", "1: exec"),
        ("import os\nos.system('x')", "2: os.system"),
        ("from os import system\nsystem('x')", "2: os.system"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "2: shell"),
        ("P.from_pretrained(f, trust_remote_code=True)", "1: trust_remote_code"),
        ("P.from_pretrained(f, use_safetensors=False)", "1: use_safetensors"),
    ],
)
def test_the_checker_sees_offenders(source, said):
    assert offences(source) == [said]


def test_the_checker_lets_the_rest_pass():
    source = "net(x).eval()\nre.compile(x)\nyaml.safe_load(t)\nnp.load(p, allow_pickle=False)\nsafetensors.torch.save(x)"
    assert offences(source) == []


def refusal(call) -> str:
    begun = time.process_time()
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500 and time.process_time() - begun < 20
    return str(error.value)


def bomb(join: str) -> str:
    """Lines of YAML, each ten times the one before: 10^12 values."""
    lines = ["a0: &a0 {k: v}"]
    return "\n".join(lines + [f"a{n}: &a{n} {join % ', '.join([f'*a{n - 1}'] * 10)}" for n in range(1, 13)]) + "\nstage: *a12\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: !!python/object/apply:os.system ['touch ran']", "not valid YAML: could not determine a constructor"),
        ("stage: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("stage: !!python/object/new:os.system ['touch ran']", "not valid YAML: could not determine a constructor"),
        (bomb("[%s]"), "not valid YAML: its aliases stand for more than"),
        (bomb("{<<: [%s]}"), "not valid YAML: its aliases stand for more than"),
        ("stage: &a [*a]", "not valid YAML: its aliases stand for more than"),
        ("[" * 20_000, "not valid YAML"),
        ("stage: 2001-99-99", "not valid YAML"),
        ("stage: {[1]: 2}", "not valid YAML"),
    ],
)
def test_yaml_runs_nothing_and_ends(here, text, said):
    Path("run.yaml").write_text(text)
    assert refusal(lambda: load_config("run.yaml")).startswith(f"run.yaml: {said}")
    assert [p.name for p in here.iterdir()] == ["run.yaml"]
    override = "train=" + text.split("stage: ", 1)[-1]
    assert "override" in refusal(lambda: load_config(ROOT / "configs/fashion-mnist/diffusion.yaml", [override]))


def test_aliases_that_are_few_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("stage: no\nx: &x [1, 2]\ny: *x\n")
    assert "stage: " in refusal(lambda: load_config(tmp_path / "run.yaml"))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb_png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG whose header claims a size its pixels do not have."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")


TEXT = [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))]
TEXTS = [chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(1_000_000))) for n in range(90)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bad", [(60_000, 60_000), (10_000, 10_000), (8, 8, *TEXT), (8, 8, *TEXTS)])
def test_a_bomb_is_an_unreadable_image(tmp_path, bad):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("L", (8, 8)).save(data / "good.png")
    (data / "bomb.png").write_bytes(bomb_png(*bad))
    before = peak()
    reason = inspect(data / "bomb.png")
    assert isinstance(reason, str) and re.search("pixels|too large|memory", reason), reason
    source = open_source(str(data), max_bad_share=0.6)
    assert source.files == ["good.png"] and list(source.bad) == ["bomb.png"]
    assert f"{data}/bomb.png (" in refusal(lambda: open_source(str(data), max_bad_share=0))
    assert peak() - before < 150_000  # KiB
    if len(bad) == 2:
        with pytest.raises(Image.DecompressionBombError):
            decode(data / "bomb.png", 1)


def peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_as_many_pixels_as_the_limit_are_read(tmp_path, monkeypatch):
    Image.new("L", (20, 5)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert inspect(tmp_path / "a.png") == ("L", (5, 20)) and decode(tmp_path / "a.png", 1).shape == (5, 20, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert "more than Pillow's limit of 99" in inspect(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_takes_memory_for_what_is_there(tmp_path, suffix):
    import gzip

    file, before = tmp_path / f"idx{suffix}", peak()
    write = gzip.compress if suffix else bytes
    for sizes, length in (((2**32 - 1,) * 3, 3), ((2**31, 2**31, 4), 0), ((1, 2, 3), 7), ((1, 2, 3), 200_000_000)):
        file.write_bytes(write(bytes([0, 0, 8, 3]) + struct.pack(">III", *sizes) + bytes(length)))
        before = peak()
        assert str(file) in refusal(lambda: read_idx(file, 3))
        assert peak() - before < 100_000
    file.write_bytes(write(bytes([0, 0, 8, 3]) + struct.pack(">III", 1, 2, 3) + bytes(range(6))))
    assert read_idx(file, 3).tolist() == [[[0, 1, 2], [3, 4, 5]]]


OUTSIDE = ["../secret.png", "a/../../secret.png", "SECRET", "nul\0.png", "\ud800.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_file_names_stay_in_the_data_folder(tmp_path, name):
    for part in ("train", "test"):
        folder = tmp_path / "data" / part
        (folder / "a").mkdir(parents=True)
        for file in (tmp_path / "secret.png", tmp_path / "data" / "secret.png", folder / "in.png"):
            Image.new("RGB", (16, 16)).save(file)
        rows = [
            {"file_name": n, "text": "x", "style": "s", "identity": "i", "name": "n"}
            for n in ("in.png", name.replace("SECRET", str(tmp_path / "secret.png")))
        ]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (open_source, read_pairs):
        line = refusal(lambda read=read: read(str(tmp_path / "data")))
        assert line.startswith(f"{tmp_path / 'data' / 'train' / 'metadata.jsonl'} line 2: file_name ")
        assert "is not inside" in line


def test_links_in_a_data_folder_are_read(tmp_path):
    # The Hub's downloads are folders of links to a store beside them
    folder, store = tmp_path / "snapshot", tmp_path / "blobs"
    for made in (folder, store):
        made.mkdir()
    for k, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (16, 16)).save(store / f"{k}.png")
        os.symlink(f"../blobs/{k}.png", folder / name)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "./b.png", "text": "y"}\n')
    assert len(open_source(str(folder))) == 2


def evil(path: Path, *members: tarfile.TarInfo) -> Path:
    """The google package with more members, the first of all."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        for name, content in package("emoji-datasource-google").items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_nothing_of_a_tarball_is_extracted_or_followed(here):
    rest = [tarball(here / f"{i}.tgz", package(n)) for i, n in enumerate(("emojibase-data", "emoji-datasource-twitter"))]
    members = [
        member("../../escaped", size=3),
        member(str(here / "escaped"), size=3),
        member("package/emoji.json", tarfile.SYMTYPE, "/etc/passwd"),
        member("package/package.json", tarfile.SYMTYPE, "package/package.json"),
        member("package/emoji.json", tarfile.LNKTYPE, "nowhere"),
    ]
    prepare_emoji(here / "out", [evil(here / "evil.tgz", *members), *rest])
    assert sorted(p.name for p in here.iterdir()) == ["0.tgz", "1.tgz", "evil.tgz", "out"]
    assert not list(here.parent.rglob("escaped"))
    assert {p.suffix for p in (here / "out").rglob("*.*")} == {".md", ".jsonl", ".png"}
    large = evil(here / "evil.tgz", member("package/emoji.json", size=70_000_000))
    assert f"{large}: package/emoji.json has 70000000 bytes" in refusal(lambda: prepare_emoji(here / "out2", [large, *rest]))


@pytest.fixture
def planted(tmp_path):
    """A checkpoint whose every Python file would leave a mark."""
    write_checkpoint(tmp_path / "model")
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    source = (tmp_path / "model" / "pipeline.py").read_text()
    future = re.search(r"^from __future__.*$", source, re.M)
    start = future.end() + 1 if future else 0
    (tmp_path / "model" / "pipeline.py").write_text(source[:start] + code + source[start:])
    for name in ("unet/mine.py", "unet/unet.py", "scheduler/scheduler.py", "vae/__init__.py"):
        (tmp_path / "model" / name).write_text(code)
    return tmp_path / "model", mark


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(planted, run):
    from diffusers import DiffusionPipeline

    folder, mark = planted
    LatentDiffusionPipeline.from_pretrained(str(folder))
    checkpoints.load(folder)
    run("info", folder)
    run("generate", "a", "--model", folder, "--steps", 2, "--out", "x.png")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(str(folder))
    assert not mark.exists()
    DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "pair",
    [
        ["os", "system"],
        ["pipeline", "LatentDiffusionPipeline"],
        ["mine", "UNet2DModel"],
        ["diffusers", "utils"],
        ["diffusers", "__loader__"],
        ["subprocess", "Popen"],
        "os.system",
        ["diffusers", ["os"]],
        {"diffusers": 1},
        [None, None],
    ],
)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_parts_are_classes_of_known_libraries(planted, part, pair):
    folder, mark = planted
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: pair}))
    line = refusal(lambda: checkpoints.load(folder))
    assert line.startswith(f"{folder / 'model_index.json'}: {part}")
    assert not mark.exists()


def test_custom_parts_are_not_run_by_the_pipeline_either(planted):
    folder, mark = planted
    index = json.loads((folder / "model_index.json").read_text())
    for pair in (["mine", "UNet2DModel"], ["pipeline", "LatentDiffusionPipeline"], ["os", "system"]):
        (folder / "model_index.json").write_text(json.dumps({**index, "unet": pair}))
        with pytest.raises(Exception, match="."):
            LatentDiffusionPipeline.from_pretrained(str(folder))
        assert not mark.exists()


def test_remote_code_of_a_text_encoder_is_not_run(tmp_path):
    from tiny_stable import write_stable

    folder, mark = write_stable(tmp_path / "model"), tmp_path / "ran"
    (folder / "text_encoder" / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for file in (folder / "text_encoder" / "config.json", folder / "tokenizer" / "tokenizer_config.json"):
        config = json.loads(file.read_text())
        config["auto_map"] = {name: "mine.Mine" for name in ("AutoModel", "AutoConfig", "AutoTokenizer", "CLIPTextModel")}
        file.write_text(json.dumps(config))
    assert isinstance(checkpoints.load(folder).text_encoder, torch.nn.Module)
    assert not mark.exists() and "mine" not in sys.modules


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """A folder in Stable Diffusion's layout whose text encoder has code beside it, which every auto_map there names."""
    from tiny_stable import write_stable

    folder, mark = write_stable(tmp_path / "model"), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import PretrainedConfig\nclass Mine(PretrainedConfig): pass\n"
    for part in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        (folder / part / "mine.py").write_text(code)
    for file in (folder / "text_encoder" / "config.json", folder / "tokenizer" / "tokenizer_config.json"):
        change_json(file, auto_map={name: "mine.Mine" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")})

    def ask(*_):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", ask)
    yield folder, mark
    assert not mark.exists() and "mine" not in sys.modules


AUTO = [
    ("text_encoder", ["transformers", "AutoModel"]),
    ("text_encoder", ["transformers", "AutoModelForCausalLM"]),
    ("tokenizer", ["transformers", "AutoTokenizer"]),
    ("tokenizer", ["transformers", "AutoProcessor"]),
    ("unet", ["diffusers", "AutoModel"]),
    ("unet", ["transformers", "AutoModel"]),
    ("vae", ["diffusers", "AutoModel"]),
    ("text_encoder", ["transformers", "pipeline"]),
    ("unet", ["diffusers", "DiffusionPipeline"]),
    ("scheduler", ["diffusers", "AutoPipelineForText2Image"]),
    ("scheduler", ["transformers", "AutoConfig"]),
]


@pytest.mark.parametrize(("part", "pair"), AUTO, ids=lambda value: value if isinstance(value, str) else value[1])
def test_auto_classes_are_refused_and_nobody_is_asked(mapped, run, refused, part, pair):
    folder, _ = mapped
    change_json(folder / "model_index.json", **{part: pair})
    assert refusal(lambda: checkpoints.load(folder)).startswith(f"{folder / 'model_index.json'}: {part}")
    assert f"{part}" in refused("generate", "a", "--model", folder, "--steps", 2, "--out", "x.png")
    with pytest.raises(Exception, match=".") as error:
        LatentDiffusionPipeline.from_pretrained(str(folder))
    assert not isinstance(error.value, AssertionError)


@pytest.mark.parametrize("key", ["null_prompt", "prediction", "schedule", "mine", "default_sampler", "class_names"])
def test_a_pair_in_the_place_of_a_value_is_no_part(mapped, key):
    folder, _ = mapped
    shutil.copytree(folder / "text_encoder", folder / key)
    change_json(folder / "model_index.json", **{key: ["transformers", "AutoModel"]})
    line = refusal(lambda: checkpoints.load(folder))
    assert key in line
    with pytest.raises(ValueError, match=f"model_index.json: {key}"):
        LatentDiffusionPipeline.from_pretrained(str(folder))


FETCHED = [
    ("attn_implementation", "kernels-community/flash-attn"),
    ("_attn_implementation", "someone/kernel@main:f"),
    ("_attn_implementation_internal", "someone/kernel"),
    ("attn_implementation", {"": "someone/kernel"}),
    ("attn_implementation", "flash_attention_2"),
    ("attn_implementation", "paged|sdpa"),
    ("experts_implementation", "a/b"),
    ("quantization_config", {"quant_method": "awq"}),
    ("quantization_config", "x"),
    ("fusion_config", {"a": "b/c"}),
    ("transformers_weights", "evil.bin"),
    ("text_config", {"attn_implementation": "someone/kernel"}),
]


@pytest.mark.parametrize(("key", "value"), FETCHED)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_keys_that_fetch_code_are_refused(mapped, part, key, value):
    folder, _ = mapped
    file = folder / part / "config.json"
    change_json(file, **{key: value})
    line = refusal(lambda: checkpoints.load(folder))
    assert line.startswith(f"{file}: ") and "fetch" in line
    if key != "text_config" and "experts" not in key:
        with pytest.raises(ValueError, match=f"{part}/config.json: {key}"):
            LatentDiffusionPipeline.from_pretrained(str(folder))


def test_plain_attention_is_read(mapped):
    folder, _ = mapped
    for value in ("sdpa", "eager", None):
        change_json(folder / "text_encoder" / "config.json", attn_implementation=value)
        assert checkpoints.load(folder).text_encoder is not None
        LatentDiffusionPipeline.from_pretrained(str(folder))


def test_training_measuring_and_importing_refuse_them_too(mapped, tmp_path):
    from tiny_stable import write_original

    from latentdiff.evaluation.feature_spaces import open_space
    from latentdiff.models.text_encoder import load_prompt_encoder, states_width
    from latentdiff.single_file import import_checkpoint

    folder, _ = mapped
    file = write_original(folder, tmp_path / "a.safetensors")
    config = folder / "text_encoder" / "config.json"
    load_prompt_encoder(str(folder))
    change_json(config, attn_implementation="someone/kernel")
    for read in (load_prompt_encoder, states_width):
        assert "attn_implementation" in refusal(lambda read=read: read(str(folder)))
    assert "attn_implementation" in refusal(lambda: open_space(folder / "text_encoder"))
    assert "attn_implementation" in refusal(lambda: import_checkpoint(file, folder, tmp_path / "out"))
    change_json(config, attn_implementation=None)
    change_json(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])
    assert "AutoModel" in refusal(lambda: import_checkpoint(file, folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def from_pretrained_calls() -> list[tuple[str, int, set[str]]]:
    """(file, line, keywords) of each call of an Auto class's from_pretrained in the library."""
    found = []
    for path in (ROOT / "latentdiff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(r"\bAuto\w+\.from_pretrained$", dotted(node.func)):
                if "AutoencoderKL" not in dotted(node.func):
                    found.append((path.name, node.lineno, {k.arg for k in node.keywords}))
    return found


def test_every_auto_class_is_called_without_trust():
    calls = from_pretrained_calls()
    assert len(calls) >= 3 and all("trust_remote_code" in keywords for _, _, keywords in calls), calls
