"""Our text checkpoints elsewhere: the same latents in unmodified diffusers, parts that load alone, LoRA by PEFT."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import autoencoder_config
from tiny_stable import BETAS, open_stock, stable_parts
from tiny_text import text_tree, write_bert, write_captioned
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff import checkpoints
from latentdiff.config import parse_config
from latentdiff.data.captions import Captions, build_states
from latentdiff.data.sources import open_source
from latentdiff.models.text_encoder import load_prompt_encoder
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.training import train

WORDS = "across down blank stripes a picture of"
PROMPTS, NEGATIVE = ["across stripes", "a picture of blank"], ["down", ""]
TOLERANCE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """trained(**changes) -> the published folder of a text run over one first stage and one data set."""
    root = tmp_path_factory.mktemp("out")
    data = write_captioned(root / "data")
    autoencoder = train(autoencoder_config(data, root / "autoencoder"))

    def trained(name, **changes):
        # a rate at which a few steps make prompts differ
        changes = {"optimizer__lr": 0.02, **changes}
        return train(parse_config(text_tree(data, root / name, autoencoder, **changes)))

    return trained


@pytest.fixture(scope="module")
def model(runs):
    return runs("text")


@pytest.fixture(autouse=True)
def no_cache_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def noise(pipe, count=2):
    return torch.randn((count, *pipe.latent_shape), generator=torch.Generator().manual_seed(0))


def latents(pipe, x, scale=3.0, steps=5, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt=PROMPTS, negative_prompt=NEGATIVE, guidance_scale=scale, num_inference_steps=steps, output_type="latent")
    return pipe(**{**call, "latents": x, **changes}).images


def encoded_again(*_):
    pytest.fail("the states are those of training, so none is encoded again")


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_the_stock_pipelines_give_our_latents(model, scheduler):
    ours, stock = checkpoints.load(model), open_stock(model)
    remote = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, torch_dtype=torch.float32)
    assert type(stock) is type(remote) is StableDiffusionPipeline
    if scheduler is not None:
        for pipe in (ours, stock, remote):
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    x = noise(ours)
    for scale in (1.0, 3.0):
        expected = latents(ours, x, scale)
        torch.testing.assert_close(latents(stock, x, scale), expected, **TOLERANCE)
        torch.testing.assert_close(latents(remote, x, scale), expected, **TOLERANCE)
    # the comparison can fail: another prompt, another thing to guide away from
    assert (latents(stock, x, prompt=PROMPTS[::-1]) - expected).abs().max() > 1e-3
    assert (latents(stock, x, negative_prompt=NEGATIVE[::-1]) - expected).abs().max() > 1e-3
    pictures = [latents(pipe, x, output_type="np") for pipe in (ours, stock)]
    assert pictures[0].shape == (2, 16, 16, 1) and abs(pictures[0] - pictures[1]).max() < 1e-4


def test_a_class_and_a_text_together_open_by_the_folders_own_file(runs):
    folder = runs("both", condition__type="class+text")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == ["pipeline", "LatentDiffusionPipeline"]
    ours = checkpoints.load(folder)
    remote = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    assert type(remote) is not type(ours) and type(remote).__name__ == "LatentDiffusionPipeline"
    x, call = noise(ours), {"class_labels": ["blank", None]}
    torch.testing.assert_close(latents(remote, x, **call), latents(ours, x, **call), **TOLERANCE)
    assert (latents(remote, x, class_labels=[0, 1]) - latents(ours, x, **call)).abs().max() > 1e-3


def test_every_part_loads_by_its_own_class(model):
    ours = checkpoints.load(model)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        part, info = kind.from_pretrained(model, subfolder=name, torch_dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], name
        expected = getattr(ours, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in part.state_dict().items())
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    assert tokenizer(PROMPTS)["input_ids"] == ours.tokenizer(PROMPTS)["input_ids"] and tokenizer.model_max_length == 12
    # transformers before 5.6, and other tools, know the names with this prefix alone
    with safe_open(model / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())


def test_a_lora_trained_with_peft_loads_and_changes_the_picture(model, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    states, x = checkpoints.load(model).conditioning(PROMPTS, [None])["encoder_hidden_states"].detach(), torch.randn(2, 2, 8, 8)
    for _ in range(3):
        optimizer.zero_grad()
        unet(x, torch.tensor([10, 500]), encoder_hidden_states=states).sample.square().mean().backward()
        optimizer.step()
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)

    ours, stock = checkpoints.load(model), open_stock(model)
    x = noise(ours)
    before = {sampler: latents(ours, x, **({"sampler": sampler} if sampler else {})) for sampler in (None, "dpmpp_2m")}
    for pipe in (ours, stock):
        pipe.load_lora_weights(tmp_path)
    for sampler, was in before.items():
        assert (latents(ours, x, **({"sampler": sampler} if sampler else {})) - was).abs().max() > 1e-3
    torch.testing.assert_close(latents(ours, x), latents(stock, x), **TOLERANCE)
    ours.unload_lora_weights()
    torch.testing.assert_close(latents(ours, x), before[None], **TOLERANCE)


def test_a_bert_is_told_of_padding_alike_in_training_here_and_in_stock(runs, tmp_path):
    bert = write_bert(tmp_path / "bert", WORDS)
    weights = {k: 15 * v if ".attention." in k else v for k, v in load_file(bert / "model.safetensors").items()}
    save_file(weights, bert / "model.safetensors", {"format": "pt"})  # what is attended to now matters
    folder = runs("bert", condition__text={"encoder": str(bert)})
    ours, stock = checkpoints.load(folder), open_stock(folder)
    assert type(stock.text_encoder).__name__ == "BertModel" and stock.text_encoder.config.use_attention_mask is True
    # what the U-Net was told in training: the states on disk, kept in float16
    table = Captions(open_source(str(folder.parents[1] / "data")).captions)
    states = build_states(load_prompt_encoder(str(bert)), table, folder.parent / "captions", progress=encoded_again)
    rows = torch.tensor([table.distinct.index(text) for text in PROMPTS])
    told = ours.conditioning(PROMPTS, [None])["encoder_hidden_states"]
    torch.testing.assert_close(told, states[rows], rtol=1e-2, atol=1e-2)
    theirs = stock.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    torch.testing.assert_close(theirs, told, **TOLERANCE)
    x = noise(ours)
    expected = latents(ours, x)
    torch.testing.assert_close(latents(stock, x), expected, **TOLERANCE)
    stock.text_encoder.config.use_attention_mask = False  # the check can fail
    assert (stock.encode_prompt(PROMPTS, "cpu", 1, False)[0] - told).abs().max() > 0.05
    assert (latents(stock, x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scheduler", "config", "vae", "named"),
    [
        (PNDMScheduler, {"steps_offset": 1, "skip_prk_steps": True}, {}, True),
        (DDIMScheduler, {"clip_sample": False, "steps_offset": 0, "timestep_spacing": "trailing"}, {}, True),
        (DDIMScheduler, {"clip_sample": False, "steps_offset": 0}, {}, False),  # stock would set it to 1
        (DDIMScheduler, {"clip_sample": True, "steps_offset": 1}, {}, False),  # stock would set it to False
        (FlowMatchEulerDiscreteScheduler, {}, {}, False),  # has no scale_model_input
        (None, {}, {}, False),
        (PNDMScheduler, {"steps_offset": 1}, {"shift_factor": 0.5}, False),  # stock would leave it out
        (PNDMScheduler, {"steps_offset": 1}, {"latents_mean": [0, 0, 0, 1.0], "latents_std": [1.0] * 4}, False),
    ],
)
def test_only_what_stock_runs_alike_is_named_stable_diffusion(scheduler, config, vae, named):
    parts = stable_parts()
    betas = BETAS if scheduler not in (None, FlowMatchEulerDiscreteScheduler) else {}
    parts["scheduler"] = scheduler and scheduler(**betas, **config)
    parts["vae"].register_to_config(**vae)
    stated = {"prediction": "epsilon", "schedule": {"name": "ve"}, "default_sampler": "ddim"} if scheduler is None else {}
    pipe = LatentDiffusionPipeline(**parts, **stated)
    name = json.loads(pipe.to_json_string())["_class_name"]
    assert name == ("StableDiffusionPipeline" if named else ["pipeline", "LatentDiffusionPipeline"])
