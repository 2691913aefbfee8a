"""Hashes lie beside published weights and are checked: a flipped bit is named, and whoever changes weights can go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hostile import KINDS, broken_json, write_checkpoint
from safetensors.torch import load_file, save_file
from test_security_files import said
from tiny_models import tiny_vae
from tiny_stable import open_stock, stable_parts

from latentdiff import checkpoints
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.pipelines import latent_diffusion
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.utils.hashes import FILE, check_hashes, checked, sha256_of, write_hashes

ROOT = Path(__file__).parents[2]
PUBLISHED = {name: kind for name, kind in KINDS.items() if name not in ("cache", "autoencoder")}


def flip(file: Path, at: int = -3) -> None:
    """One bit of one byte, among the numbers: the header is at the front."""
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def publish_text(folder: Path) -> Path:
    parts = stable_parts()
    return checkpoints.save(folder, **parts, meta={}, null_prompt="", dtype=torch.float32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_flipped_bit_in_published_weights_is_named(tmp_path, name):
    kind, folder = PUBLISHED[name], tmp_path / "it"
    kind.write(folder)
    kind.load(folder)
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        flip(file)
        line = said(lambda: kind.load(folder))
        assert line is not None and line.startswith(f"{file}: its sha256 is not the one in {FILE}: damaged, or changed")
        assert str(file.parent / FILE) in line
        flip(file)
        kind.load(folder)


def test_every_part_of_a_text_model_is_hashed(tmp_path):
    folder = publish_text(tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        assert json.loads((folder / part / FILE).read_text()) == {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        }
        flip(file)
        assert str(file) in str(said(lambda: checkpoints.load(folder)))
        assert checkpoints.load(folder, verify=False).unet is not None
        flip(file)
    assert not (folder / "tokenizer" / FILE).exists() and not (folder / "scheduler" / FILE).exists()


def test_shards_are_hashed_each(tmp_path):
    publish_text(tmp_path / "model")
    pipe = checkpoints.load(tmp_path / "model")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted((tmp_path / "shards" / "unet").glob("*.safetensors"))
    assert len(files) > 2
    checkpoints.load(tmp_path / "shards")
    for file in files:
        flip(file)
        assert str(file) in str(said(lambda: checkpoints.load(tmp_path / "shards")))
        flip(file)
    files[1].unlink()
    assert str(files[1]) in str(said(lambda: checkpoints.load(tmp_path / "shards")))


def test_another_length_is_named_without_reading(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    write_hashes(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(bytes(101))
    line = said(lambda: check_hashes([tmp_path / "a.safetensors"]))
    assert "has 101 bytes, and hashes.json says 100" in str(line)


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_our_pipeline_saved_onto_itself_after_a_change_opens_again(tmp_path, saving):
    folder = publish_text(tmp_path / "model")
    pipe = checkpoints.load(folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    if saving.get("variant"):
        pipe.to(torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        (folder / part / FILE).exists()
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    pipe.save_pretrained(folder, **saving)
    if saving.get("safe_serialization") is False:
        assert not list(folder.glob("unet/*.safetensors")) and not (folder / "unet" / FILE).exists()
        return
    again = checkpoints.load(folder, dtype=pipe.unet.dtype)
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    (first, *_) = sorted((folder / "unet").glob("*.safetensors"))
    flip(first)
    assert str(first) in str(said(lambda: checkpoints.load(folder)))


def test_a_fused_lora_is_saved_with_hashes_of_its_own(tmp_path):
    from peft import LoraConfig

    folder = publish_text(tmp_path / "model")
    pipe = checkpoints.load(folder)
    before = sha256_of(folder / "unet" / "diffusion_pytorch_model.safetensors")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    checkpoints.load(folder)
    entry = json.loads((folder / "unet" / FILE).read_text())["diffusion_pytorch_model.safetensors"]
    assert entry["sha256"] == sha256_of(folder / "unet" / "diffusion_pytorch_model.safetensors") != before


def test_a_stock_pipeline_saves_elsewhere_without_hashes_and_onto_itself_with_stale_ones(tmp_path):
    folder = publish_text(tmp_path / "model")
    pipe = open_stock(folder)
    assert type(pipe) is StableDiffusionPipeline
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    pipe.save_pretrained(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob(FILE))
    checkpoints.load(tmp_path / "elsewhere")
    pipe.save_pretrained(folder)
    line = said(lambda: checkpoints.load(folder))
    assert line is not None and line.endswith(f"if the change is yours, delete {folder / 'unet' / FILE}")
    (folder / "unet" / FILE).unlink()
    checkpoints.load(folder)


def test_a_file_put_there_later_is_named(tmp_path):
    folder = publish_text(tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "does not list it, so it was put there later" in str(said(lambda: checkpoints.load(folder)))


def test_an_autoencoder_in_the_place_of_a_vae_brings_its_own(tmp_path):
    write_checkpoint(tmp_path / "model")
    torch.manual_seed(5)
    tiny_vae().save_pretrained(tmp_path / "autoencoder")
    write_hashes(tmp_path / "autoencoder")
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.copytree(tmp_path / "autoencoder", tmp_path / "model" / "vae")
    checkpoints.load(tmp_path / "model")
    flip(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    for load in (checkpoints.load, lambda folder: load_autoencoder(str(folder))):
        assert "vae/diffusion_pytorch_model" in str(said(lambda load=load: load(tmp_path / "model")))
    load_autoencoder(str(tmp_path / "model"), verify=False)


def test_stage_one_publishes_hashes(autoencoder_run):
    (file,) = (autoencoder_run / "autoencoder").glob("*.safetensors")
    assert json.loads((autoencoder_run / "autoencoder" / FILE).read_text())[file.name]["sha256"] == sha256_of(file)


def test_a_hash_file_that_lies_is_named(tmp_path):
    KINDS["features"].write(tmp_path / "it")
    file = tmp_path / "it" / FILE
    text = file.read_text()
    for what, raw in broken_json(text):
        file.write_bytes(raw)
        line = said(lambda: KINDS["features"].load(tmp_path / "it"))
        assert line is not None and str(file) in line, what
    for entry in (None, 5, {}, {"bytes": "x", "sha256": 1}, {"bytes": 1e308, "sha256": "a"}):
        file.write_text(json.dumps({"model.safetensors": entry}))
        line = said(lambda: KINDS["features"].load(tmp_path / "it"))
        assert line is not None and str(file) in line, entry
    file.write_text(text)
    KINDS["features"].load(tmp_path / "it")


def test_a_pipeline_writes_what_the_library_writes(tmp_path):
    for folder, write in ((tmp_path / "a", write_hashes), (tmp_path / "b", latent_diffusion.write_hashes)):
        folder.mkdir()
        save_file({"w": torch.arange(6.0)}, folder / "a.safetensors")
        save_file({"w": torch.arange(7.0)}, folder / "b.safetensors")
        write(folder)
    assert (tmp_path / "a" / FILE).read_text() == (tmp_path / "b" / FILE).read_text()
    for folder, write in ((tmp_path / "a", write_hashes), (tmp_path / "b", latent_diffusion.write_hashes)):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        write(folder)
        assert not list(folder.iterdir())


SHIPPED = sorted((ROOT / "weights").rglob("*.safetensors"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_the_shipped_weights_are_those_of_their_hashes(file):
    assert (file.parent / FILE).is_file()
    check_hashes([file])


def test_a_pipeline_without_weights_in_a_part_saves(tmp_path):
    write_checkpoint(tmp_path / "model")
    pipe = LatentDiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    pipe.save_pretrained(tmp_path / "other")
    checkpoints.load(tmp_path / "other")
    assert load_file(tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors")


def test_commands_have_a_flag_that_skips_the_check(tmp_path, run, refused):
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    flip(file, -4)
    line = refused("generate", "a", "--model", tmp_path / "model", "--steps", 1, "--out", "x.png")
    assert line.startswith(f"latentdiff: {file}: its sha256 is not the one in hashes.json")
    assert refused("info", tmp_path / "model").startswith(f"latentdiff: {file}: ")
    run("generate", "a", "--model", tmp_path / "model", "--steps", 1, "--out", "x.png", "--no-verify")
    run("info", tmp_path / "model", "--no-verify")
    with checked(False):
        checkpoints.load(tmp_path / "model")
    assert said(lambda: checkpoints.load(tmp_path / "model")) is not None
