"""Weights and configs that lie: each loader of the project says in one line which file is wrong, and takes no memory for it."""

import json
import resource
import tracemalloc

import pytest
import torch
from hostile import KINDS, VALUES, broken_json, lies, places, with_value, without_hashes
from safetensors.torch import save_file
from tiny_text import write_bert

from latentdiff import checkpoints
from latentdiff.data.captions import Captions, build_states
from latentdiff.data.tensor_shards import stored_identity, write_shard
from latentdiff.errors import UserError
from latentdiff.models.loading import weight_files
from latentdiff.models.text_encoder import PromptEncoder

# Deterministic, and few enough for a checkpoint of four configs
TRIED = {"checkpoint": (1, 29), "autoencoder": (1, 11), "cache": (3, 3)}  # (depth, one in so many); (3, 1) for the rest


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def folder(kind, tmp_path):
    kind.write(tmp_path / "it")
    kind.load(tmp_path / "it")
    without_hashes(tmp_path / "it")
    return tmp_path / "it"


def said(load) -> str | None:
    """The one line of the UserError, or None where it loads; whatever else is raised comes through."""
    try:
        load()
    except UserError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 1000
        return line
    return None


def test_weights_that_lie_are_named(kind, folder, tmp_path):
    file = folder / kind.weights
    raw = file.read_bytes()
    for what, lie in lies(raw, tmp_path):
        file.write_bytes(lie)
        line = said(lambda: kind.load(folder))
        assert line is not None, what
        assert file.name in line, (what, line)
    file.write_bytes(raw)
    kind.load(folder)
    assert not list(tmp_path.rglob("ran"))


def test_broken_json_is_named(kind, folder):
    for config in kind.configs:
        file = folder / config
        text = file.read_text()
        for what, raw in broken_json(text):
            file.write_bytes(raw)
            line = said(lambda: kind.load(folder))
            assert line is not None and file.name in line, (config, what, line)
        file.write_text(text)


def test_values_of_another_kind_load_or_are_refused(request, kind, folder):
    name = request.node.callspec.params["kind"]
    depth, step = TRIED.get(name, (3, 1))
    refused = 0
    for config in kind.configs:
        file = folder / config
        text = file.read_text()
        tree = json.loads(text)
        cases = [(path, value) for path in places(tree, depth) for value in [KeyError, *VALUES]]
        for path, value in cases[::step]:
            file.write_text(json.dumps(with_value(tree, path, value)))
            refused += said(lambda: kind.load(folder)) is not None
        file.write_text(text)
    assert refused > 10


def test_a_config_of_a_network_beyond_memory_takes_none(folder, kind):
    sizes = {"widths": [40_000] * 3, "block_out_channels": [40_000] * 2, "layers_per_block": 10**9}
    for config in kind.configs:
        file = folder / config
        tree = json.loads(file.read_text())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for key in set(sizes) & set(tree):
            wrong = sizes[key][: len(tree[key])] if isinstance(sizes[key], list) else sizes[key]
            file.write_text(json.dumps({**tree, key: wrong}))
            line = said(lambda: kind.load(folder))
            assert line is not None and file.name in line, (key, line)
        file.write_text(json.dumps(tree))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_a_record_of_training_may_be_anything_but_is_named(tmp_path):
    KINDS["checkpoint"].write(tmp_path / "model")
    file = tmp_path / "model" / "latentdiff.json"
    for _, raw in broken_json(file.read_text()):
        file.write_bytes(raw)
        line = said(lambda: checkpoints.read_meta(tmp_path / "model"))
        assert line is not None and str(file) in line


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 5, None, "..", ""])
def test_an_index_names_only_files_beside_it(tmp_path, name):
    part = tmp_path / "unet"
    part.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="must be a file beside it") as error:
        weight_files(part)
    assert str(index) in str(error.value)
    save_file({"w": torch.zeros(1)}, part / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert weight_files(part) == (None, [part / "a.safetensors"])


@pytest.fixture
def prompts(tmp_path):
    from transformers import AutoTokenizer, BertModel

    where = write_bert(tmp_path / "bert", "a b c")
    return PromptEncoder(AutoTokenizer.from_pretrained(where), BertModel.from_pretrained(where).eval())


def test_caption_states_that_lie_are_named(tmp_path, prompts):
    captions, folder = Captions([("a",), ("b", "c")]), tmp_path / "states"
    build_states(prompts, captions, folder)
    (file,) = folder.glob("*.safetensors")
    raw, made_of = file.read_bytes(), stored_identity(file)
    for tensors in (
        {"other": torch.zeros(4, 2, 2)},
        {"states": torch.zeros(3, 2, 2)},
        {"states": torch.zeros(4)},
        {"states": torch.zeros(4, 2, 2, dtype=torch.int64)},
    ):
        write_shard(file, tensors, made_of)
        line = said(lambda: build_states(prompts, captions, folder))
        assert line is not None and str(file) in line
    for _, lie in lies(raw, tmp_path):
        file.write_bytes(lie)
        said(lambda: build_states(prompts, captions, folder))  # a shard that is not whole is made again


def test_huge_headers_take_no_memory(kind, folder):
    file = folder / kind.weights
    file.write_bytes((100_000_000).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        assert said(lambda: kind.load(folder)) is not None
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
