"""LoRA of a U-Net: what is trained, saved, published and refused; the file is read by stock diffusers."""

import builtins
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from tiny_lora import lora_tree, write_base, write_sidecars
from tiny_stable import WEIGHTS, open_stock, stable_parts

from latentdiff import checkpoints, publish
from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.training import state, train
from latentdiff.training.lora import FILE

TOLERANCE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sidecars(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    return write_base(tmp_path_factory.mktemp("base") / "model", data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, base):
    """The output folder of a run, with a state of each step and snapshots. alpha is not the rank."""
    output = tmp_path_factory.mktemp("run") / "run"
    changes = {"model__lora__alpha": 6.0, "train__save_minutes": 1e-9, "train__keep": 9, "train__snapshot_every": 2}
    train(parse_config(lora_tree(data, base, output, **changes)))
    return output


def picture(pipe, seed=0, scale=3.0):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    call = dict(guidance_scale=scale, num_inference_steps=4, generator=generator, output_type="np")
    return torch.from_numpy(pipe("horizontal stripes", **call).images)


def test_stock_diffusers_loads_the_lora_and_draws_what_we_draw(trained, base):
    model = trained / "model"
    ours, stock, merged = checkpoints.load(base), open_stock(base), checkpoints.load(model)
    before = picture(ours)
    for pipe in (ours, stock):
        pipe.load_lora_weights(model)
    drawn = picture(ours)
    assert (drawn - before).abs().max() > 0.01
    torch.testing.assert_close(picture(stock), drawn, **TOLERANCE)
    # The model beside the file has it in its weights, which are halves; it is an ordinary checkpoint
    for pipe in (merged, open_stock(model)):
        pipe.scheduler = ours.scheduler
        torch.testing.assert_close(picture(pipe), drawn, rtol=0, atol=0.2 * float((drawn - before).abs().max()))
    assert load_file(model / "unet" / WEIGHTS).keys() == load_file(base / "unet" / WEIGHTS).keys()


def test_the_lora_alone_is_trained_and_saved(trained, base):
    tensors, meta = state.load_folder(trained / "state" / "step-4")
    assert all(".lora_" in name for name in (*tensors["model"], *tensors["ema"])) and len(tensors["model"]) == 64
    assert all(torch.count_nonzero(value) for value in tensors["model"].values())
    sizes = [path.stat().st_size for path in (trained / "state" / "step-4").glob("*.safetensors")]
    assert max(sizes) < (base / "unet" / WEIGHTS).stat().st_size / 2
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    weights, changed = (load_file(folder / "unet" / WEIGHTS) for folder in (base, trained / "model"))
    for name, value in changed.items():
        aimed_at = any(name.endswith(f".{target}.weight") for target in targets)
        assert torch.equal(value, weights[name].half()) is not aimed_at, name


def test_a_resumed_run_gives_the_same_bits_and_takes_no_other_base(trained, data, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    tree = lora_tree(data, own, tmp_path / "run", model__lora__alpha=6.0, train__steps=2)
    train(parse_config(tree))
    tree["train"]["steps"] = 4
    config = parse_config(tree)
    shutil.rmtree(tmp_path / "run" / "model")
    train(config, resume=True)
    assert (tmp_path / "run" / "model" / FILE).read_bytes() == (trained / "model" / FILE).read_bytes()
    unet = stable_parts(seed=1)["unet"]
    unet.save_pretrained(own / "unet")
    with pytest.raises(UserError, match=r"was trained on other base weights \(model.pretrained\) .* put the old ones back"):
        train(config, resume=True)
    with pytest.raises(UserError, match="other base weights"):
        publish(tmp_path / "run", out=tmp_path / "out")


def test_a_snapshot_is_published_as_if_the_run_had_ended_there(trained, data, base, tmp_path):
    train(parse_config(lora_tree(data, base, tmp_path / "short", model__lora__alpha=6.0, train__steps=2)))
    folder = publish(trained, step=2, out=tmp_path / "published")
    for name in (FILE, f"unet/{WEIGHTS}"):
        assert (folder / name).read_bytes() == (tmp_path / "short" / "model" / name).read_bytes()
    assert (folder / FILE).read_bytes() != (trained / "model" / FILE).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"train__micro_batch": 1}, {"train__gradient_checkpointing": True}, {"train__picture_every": 1}]
)
def test_memory_and_pictures_change_no_result(changes, trained, data, base, tmp_path):
    train(parse_config(lora_tree(data, base, tmp_path / "run", model__lora__alpha=6.0, **changes)))
    expected = load_file(trained / "model" / FILE)
    for name, value in load_file(tmp_path / "run" / "model" / FILE).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_and_other_targets(data, base, tmp_path):
    lora = {"rank": 2, "targets": ["conv1", "proj_in"]}
    tree = lora_tree(data, base, tmp_path / "run", train__precision="bfloat16", model__lora=lora, optimizer__lr=0.01)
    model = train(parse_config(tree))
    names = {name.removeprefix("unet.").rsplit(".", 2)[0].rsplit(".", 1)[1] for name in load_file(model / FILE)}
    assert names == {"conv1", "proj_in"}
    stock = open_stock(base)
    stock.load_lora_weights(model)
    assert (picture(stock) - picture(open_stock(base))).abs().max() > 1e-3


def hide_peft(monkeypatch, plain=builtins.__import__):
    def imported(name, *rest, **named):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", imported)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__lora": {"rank": 0}}, "model.lora.rank: input should be greater than 0"),
        ({"model__lora": {"rang": 2}}, "model.lora.rang: unknown key; did you mean 'rank'?"),
        ({"model": {"type": "UNet2DModel", "lora": {}}}, "model.lora: changes a trained U-Net; name it by model.pretrained"),
        ({"model__pretrained": "PLAIN", "condition": {"type": "none"}}, "is a UNet2DModel, and diffusers loads LoRAs into a"),
        ({"condition": {"type": "text", "text": {"width": 8}}}, "condition.text.encoder: a LoRA holds no text encoder"),
        ({"model__lora__targets": ["to_z"]}, "model.lora.targets: to_z: is the end of no layer's name; valid are .* to_k, "),
        ({"model__lora__targets": ["attn1"]}, "model.lora.targets: attn1: .* is a Attention; valid"),
        ({"FSDP": True}, "model.lora: is not sharded by accelerate launch --use_fsdp; launch with --multi_gpu"),
        ({"PEFT": False}, r"model.lora: needs PEFT; install it by pip install 'latentdiff\[lora\]'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(changes, said, data, base, tmp_path, monkeypatch):
    plain = tmp_path / "plain"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(8, 4, 4, block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained(plain)
    changes = {key: str(plain) if value == "PLAIN" else value for key, value in changes.items()}
    if changes.pop("FSDP", False):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    if not changes.pop("PEFT", True):
        hide_peft(monkeypatch)
    with pytest.raises(UserError, match=said) as error:
        train(parse_config(lora_tree(data, base, tmp_path / "run", **changes)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
