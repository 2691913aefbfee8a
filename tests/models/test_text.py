"""Captions: which one a step draws, what the encoder is told, states on disk, training on text, and prompts at sampling."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import autoencoder_config, write_stripes
from tiny_text import ENCODER, TEXTS, own_prompts, text_tree, write_bert, write_captioned

from latentdiff import checkpoints
from latentdiff.cli import main
from latentdiff.config import parse_config
from latentdiff.data.captions import Captions, build_states, encoder_fingerprint
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.generation import generate, generate_batches, image_generators
from latentdiff.models.text_encoder import (
    UNetWithTextEncoder,
    build_text_encoder,
    load_prompt_encoder,
    states_width,
    train_tokenizer,
)
from latentdiff.training import train
from latentdiff.utils.random import generators

WORDS = "horizontal vertical diagonal blank stripes a picture of"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(data, autoencoder folder, root) shared by the trainings below."""
    root = tmp_path_factory.mktemp("text")
    data = write_captioned(root / "data")
    return data, train(autoencoder_config(data, root / "autoencoder")), root


@pytest.fixture(scope="module")
def model(runs):
    """A published text model: two samplers' worth of steps, its own encoder trained with it."""
    data, autoencoder, root = runs
    return train(parse_config(text_tree(data, root / "joint", autoencoder)))


@pytest.fixture(scope="module")
def told_both(runs):
    """A published model of class and text together."""
    data, autoencoder, root = runs
    changes = {"condition__type": "class+text", "train__steps": 3}
    return train(parse_config(text_tree(data, root / "told-both", autoencoder, **changes)))


def test_a_list_of_captions_is_read_and_an_empty_one_among_them_refused(tmp_path):
    data = write_captioned(tmp_path / "data")
    captions = open_source(str(data)).captions
    assert len(captions) == 48 and {len(texts) for texts in captions} == {3} and captions[0][2] == "stripes"
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "text": ["x", ""]})]))
    with pytest.raises(UserError, match=r"metadata.jsonl line 48: text must be a caption, or a list"):
        open_source(str(data))


def test_a_draw_takes_every_caption_of_an_image_alike_and_none_of_another():
    captions = Captions([("x", "y", "z"), ("only",)])
    assert captions.distinct[0] == "" and sorted(captions.distinct[1:]) == ["only", "x", "y", "z"]
    choice = (torch.arange(3000) + 0.5) / 3000
    rows = captions.draw(torch.zeros(3000, dtype=torch.int64), choice, torch.zeros(3000, dtype=torch.bool))
    assert Counter(captions.distinct[row] for row in rows.tolist()) == {"x": 1000, "y": 1000, "z": 1000}
    two = captions.draw(torch.tensor([1, 0, 1]), torch.tensor([0.999999, 0.0, 0.5]), torch.tensor([False, True, False]))
    assert [captions.distinct[row] for row in two.tolist()] == ["only", "", "only"]


def test_captions_follow_the_substitute_of_an_unreadable_image(tmp_path):
    data = write_captioned(tmp_path / "data", 6)
    source = open_source(str(data))
    dataset = ImageDataset(source, Preprocess(), torch.arange(6))
    bad = {source.files[2], source.files[3], source.files[5]}
    texts = [captions[0] for captions in source.captions]
    assert [c[0] for c in dataset.captions()] == texts
    assert [c[0] for c in dataset.captions(bad)] == [texts[i] for i in (0, 1, 4, 4, 4, 0)]


def test_the_tokenizer_lowers_case_keeps_its_length_and_reads_any_text():
    tokenizer = train_tokenizer(TEXTS, 400, 12)
    assert tokenizer.model_max_length == 12 and len(tokenizer) <= 400
    assert tokenizer("A Red apple")["input_ids"] == tokenizer("a red apple")["input_ids"]
    assert tokenizer.decode(tokenizer("red grape")["input_ids"], skip_special_tokens=True).strip() == "red grape"


def test_states_of_a_prompt_do_not_depend_on_its_neighbours_nor_its_padding(tmp_path):
    own, bert = own_prompts(), load_prompt_encoder(str(write_bert(tmp_path / "bert", WORDS)))
    for prompts, texts in ((own, TEXTS), (bert, ["horizontal stripes", "a picture of blank stripes", "blank"])):
        alone = torch.cat([prompts.states([text]) for text in texts])
        torch.testing.assert_close(prompts.states(texts), alone, atol=1e-5, rtol=0)
    words = len(bert.tokenizer("horizontal stripes")["input_ids"])
    unpadded = bert.encoder(**bert.tokenizer("horizontal stripes", return_tensors="pt"))[0]
    torch.testing.assert_close(bert.states(["horizontal stripes"])[:, :words], unpadded, atol=1e-5, rtol=0)
    bert.encoder.config.use_attention_mask = False  # the check can fail: unmasked, padding disturbs what is attended to
    assert (bert.states(["horizontal stripes"])[:, :words] - unpadded).abs().max() > 1e-3


def test_cached_states_are_the_encoders_and_those_of_another_are_refused(tmp_path):
    prompts, captions = own_prompts(), Captions([tuple(TEXTS), ("extra",)])
    seen: list[tuple[int, int]] = []
    states = build_states(prompts, captions, tmp_path / "c", batch=2, progress=lambda *done: seen.append(done))
    assert seen[-1] == (6, 6)
    rows = torch.tensor([3, 0, 3])
    expected = prompts.states([captions.distinct[row] for row in rows.tolist()])
    torch.testing.assert_close(states[rows], expected, atol=2e-3, rtol=1e-3)  # kept in float16
    build_states(prompts, captions, tmp_path / "c", progress=lambda *done: pytest.fail("encoded again"))
    with torch.no_grad():
        next(prompts.encoder.parameters()).add_(1.0)
    with pytest.raises(UserError, match="other text encoder"):
        build_states(prompts, captions, tmp_path / "c")
    with pytest.raises(UserError, match="other captions"):
        build_states(own_prompts(), Captions([tuple(TEXTS), ("another",)]), tmp_path / "c")


def test_the_gradient_reaches_the_encoder_that_is_trained(runs):
    from latentdiff.models.unet import build_unet

    data, autoencoder, root = runs
    prompts = own_prompts()
    unet = build_unet(parse_config(text_tree(data, root / "x", autoencoder)), (2, 8, 8), None, 16)
    network = UNetWithTextEncoder(unet, prompts.encoder.train())
    x = torch.randn((2, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([1.0, 500.0]), **prompts.tokens(TEXTS[:2]))
    out.sample.square().mean().backward()
    embedding = prompts.encoder.get_input_embeddings().weight.grad
    used = prompts.tokens(TEXTS[:2])["input_ids"].unique()
    assert (embedding[used].abs().sum(1) > 0).all() and (embedding.abs().sum(1) > 0).sum() == len(used)


@pytest.mark.parametrize("kind", ["text", "class+text"])
def test_a_frozen_encoder_stays_as_it_was_and_both_conditions_count(runs, tmp_path, kind):
    data, autoencoder, _ = runs
    bert = write_bert(tmp_path / "bert", WORDS)
    changes = {"condition__type": kind, "condition__text": {"encoder": str(bert)}}
    folder = train(parse_config(text_tree(data, tmp_path / "run", autoencoder, **changes)))
    half = load_file(folder / "text_encoder" / "model.safetensors")
    before = load_file(bert / "model.safetensors")
    assert half.keys() == before.keys() and all(torch.equal(half[k], before[k].half()) for k in half)
    pipeline = checkpoints.load(folder)
    assert pipeline.num_classes == (3 if kind == "class+text" else 0)
    call = dict(guidance_scale=3.0, num_inference_steps=2, output_type="np")

    def draw(**told):
        return pipeline(**told, **call, generator=generators(0, range(1))).images

    plain = draw(prompt="horizontal stripes")
    assert np.abs(plain - draw(prompt="vertical stripes")).max() > 1e-4
    assert np.abs(plain - draw(prompt="horizontal stripes", negative_prompt="a picture of blank")).max() > 1e-4
    if kind == "class+text":
        assert np.abs(plain - draw(prompt="horizontal stripes", class_labels=1)).max() > 1e-4
        one = draw(class_labels=[1], negative_class_labels=2)
        assert np.abs(one - draw(class_labels=[1])).max() > 1e-4


def test_an_image_of_a_prompt_is_the_same_alone_and_in_a_batch(model):
    pipeline = checkpoints.load(model)
    texts = ["horizontal stripes", "stripes", "a picture of vertical"]
    call = dict(guidance_scale=2.0, num_inference_steps=3, output_type="np")
    batch = pipeline(prompt=texts, generator=generators(0, range(3)), **call).images
    for k, text in enumerate(texts):
        alone = pipeline(prompt=text, generator=[generators(0, range(3))[k]], **call).images
        np.testing.assert_allclose(alone[0], batch[k], atol=1e-5)


def test_no_prompt_is_the_empty_prompt_and_guidance_needs_one(model):
    pipeline = checkpoints.load(model)
    call = dict(num_inference_steps=2, output_type="np")
    none, empty = (pipeline(prompt=p, generator=generators(0, range(1)), **call).images for p in (None, ""))
    np.testing.assert_array_equal(none, empty)
    with pytest.raises(ValueError, match="guidance_scale 3: there is no class or prompt"):
        pipeline(guidance_scale=3.0)
    with pytest.raises(ValueError, match="prompt 5: must be a text"):
        pipeline(prompt=5)
    with pytest.raises(ValueError, match="2 prompts and 3 class_labels"):
        pipeline(prompt=["a", "b"], class_labels=[None] * 3)
    with pytest.raises(ValueError, match="negative_prompt: 2 entries for 3 images"):
        pipeline(prompt=["a"] * 3, negative_prompt=["b", "c"])
    with pytest.raises(ValueError, match="takes no class labels"):
        pipeline(class_labels="Bag")


def test_a_resumed_text_run_is_the_unbroken_one(runs, tmp_path, monkeypatch):
    data, autoencoder, _ = runs
    learnt = train_tokenizer(["horizontal vertical diagonal stripes", "a picture of"], 400, 12)
    calls: list[int] = []
    # Learnt anew it would number its tokens otherwise; a resumed run must read the one it began with
    monkeypatch.setattr("latentdiff.training.conditioning.train_tokenizer", lambda *_: calls.append(1) or learnt)
    whole = train(parse_config(text_tree(data, tmp_path / "whole", autoencoder)))
    train(parse_config(text_tree(data, tmp_path / "two", autoencoder, train__steps=3)))
    two = train(parse_config(text_tree(data, tmp_path / "two", autoencoder)), resume=True)
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(folder / f"{part}.safetensors") for folder in (whole, two))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "UNet2DModel"}, "model.type: UNet2DModel cannot attend to text"),
        ({"model__config": {"cross_attention_dim": 8}}, "model.config.cross_attention_dim: leave it out"),
        ({"condition__text": {**ENCODER, "dropout": 0.0}, "sample__guidance": 3.0}, "guidance: 3 needs .*text.dropout"),
        ({"condition__text": {**ENCODER, "heads": 3}}, "condition.text.width: 16 is not a multiple"),
        ({"condition__text": {"encoder": "/nowhere/bert"}}, "condition.text.encoder /nowhere/bert: needs config.json"),
        ({"condition": {"type": "none"}, "sample__guidance": 2.0}, "sample.guidance: 2 needs.*condition.type is none"),
    ],
)
def test_a_config_that_cannot_work_is_refused(runs, tmp_path, changes, said):
    data, autoencoder, _ = runs
    with pytest.raises(UserError, match=said):
        train(parse_config(text_tree(data, tmp_path / "run", autoencoder, **changes)))
    assert not (tmp_path / "run" / "state").exists()


def test_data_without_captions_is_refused(runs, tmp_path):
    data = write_stripes(tmp_path / "plain")
    with pytest.raises(UserError, match="has no captions; add a caption beside each image"):
        train(parse_config(text_tree(data, tmp_path / "run", runs[1])))


def write_clip(folder: Path) -> Path:
    """A CLIP text model of 20 positions, and a tokenizer that states no length."""
    tokenizer = train_tokenizer(TEXTS, 400, 20)
    encoder = build_text_encoder(tokenizer, 16, 1, 2)
    tokenizer.model_max_length = int(1e30)
    for part in (encoder, tokenizer):
        part.save_pretrained(folder)
    return folder


def test_prompts_are_as_long_as_the_encoder_reads_where_the_tokenizer_states_nothing(tmp_path):
    assert load_prompt_encoder(str(write_clip(tmp_path / "clip"))).length == 20


def test_an_encoder_without_a_tokenizer_of_its_own_or_that_decodes_is_refused(tmp_path):
    from transformers import BartConfig, BartModel

    bert, sizes = write_bert(tmp_path / "bert", WORDS), {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    for file in {*bert.iterdir()} - {bert / "config.json", bert / "model.safetensors"}:
        file.unlink()
    with pytest.raises(UserError, match="its tokenizer knows no words"):  # transformers makes a blank one
        load_prompt_encoder(str(bert))
    BartModel(BartConfig(vocab_size=300, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)).save_pretrained(bert)
    with pytest.raises(UserError, match="bart also decodes"):
        load_prompt_encoder(str(bert))


def test_an_encoder_that_cannot_pad_is_refused_in_one_line(tmp_path):
    clip = write_clip(tmp_path / "clip")
    tokenizer = train_tokenizer(TEXTS, 400, 20)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(clip)
    with pytest.raises(UserError, match="cannot read a prompt of 20 tokens.*padding token"):
        load_prompt_encoder(str(clip))


def test_mt5_is_read_by_its_encoder_and_clip_by_its_text_half(tmp_path):
    from transformers import CLIPConfig, MT5Config, MT5EncoderModel, ResNetConfig

    tokenizer = train_tokenizer(TEXTS, 400, 12)
    tokenizer.save_pretrained(tmp_path / "mt5")
    config = MT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    MT5EncoderModel(config).save_pretrained(tmp_path / "mt5")
    assert load_prompt_encoder(str(tmp_path / "mt5")).states(["a"]).shape == (1, 12, 16)
    CLIPConfig(text_config={"hidden_size": 24}).save_pretrained(tmp_path / "clip")
    assert states_width(str(tmp_path / "clip")) == 24
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="resnet states no hidden_size"):
        states_width(str(tmp_path / "resnet"))


def test_weights_that_were_not_saved_and_make_no_state_leave_the_fingerprint_alone(tmp_path):
    bert = write_bert(tmp_path / "bert", WORDS)
    weights = {k: v for k, v in load_file(bert / "model.safetensors").items() if not k.startswith("pooler.")}
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    prints = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        prints.append(encoder_fingerprint(load_prompt_encoder(str(bert))))
    assert prints[0] == prints[1]


@pytest.mark.parametrize("text", [" ", ["stripes", "\t"], {"a": "b"}, "\ud83d"])
def test_a_caption_that_says_nothing_is_refused(tmp_path, text):
    data = write_captioned(tmp_path / "data", 3)
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    with pytest.raises(UserError, match="line 1: text must be a caption"):
        open_source(str(data))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_not_utf8_is_one_line(tmp_path, name):
    data = write_stripes(tmp_path / "data", 3)
    (data / name).write_bytes(b"file_name,text\na.png,caf\xe9\n")
    with pytest.raises(UserError, match=f"{name}: not UTF-8"):
        open_source(str(data))


def test_what_can_be_refused_at_once_is_refused_before_anything_is_written(runs, tmp_path):
    data, autoencoder, _ = runs
    write_captioned(tmp_path / "split" / "train", 8)
    write_stripes(tmp_path / "split" / "test", 8)
    cases = [
        (data, {"condition__text": {**ENCODER, "heads": 3}}, "not a multiple"),
        (data, {"condition__text": {"encoder": str(tmp_path / "none")}}, "needs config.json"),
        (tmp_path / "split", {}, "has no captions in its held-out part"),
    ]
    for source, changes, said in cases:
        with pytest.raises(UserError, match=said):
            train(parse_config(text_tree(source, tmp_path / "run", autoencoder, **changes)))
        assert not (tmp_path / "run").exists()


def test_without_text_dropout_an_image_needs_a_prompt_and_none_is_guided_away_from(model, tmp_path):
    pipeline = checkpoints.load(model)
    pipeline.register_to_config(null_prompt=None)
    pipeline.save_pretrained(tmp_path / "kept")
    pipeline = checkpoints.load(tmp_path / "kept")
    for prompt in (None, "", " ", ["stripes", ""]):
        with pytest.raises(ValueError, match="without text dropout, so every image needs a prompt"):
            pipeline(prompt=prompt)
    for negative in (None, "", " "):
        with pytest.raises(ValueError, match="trained without text dropout"):
            pipeline(prompt="stripes", negative_prompt=negative, guidance_scale=3.0)


def test_any_prompt_makes_a_file_and_what_cannot_be_read_is_one_line(model, tmp_path):
    call = dict(num_images=1, steps=1, progress=False)
    generate(model, ["two\nlines", "stripes " * 40], out=tmp_path / "grid.png", **call)
    assert Image.open(tmp_path / "grid.png").width < 1000
    generate(model, ["\U0001d51e" * 200], out=tmp_path / "folder", **call)
    assert len(list((tmp_path / "folder").iterdir())) == 1
    with pytest.raises(UserError, match="is not valid UTF-8"):
        generate(model, ["\udcff"], out=tmp_path / "no.png", **call)
    with pytest.raises(UserError, match="--negative: at guidance 1"):
        generate(model, ["stripes"], negative="blank", guidance=1.0, out=tmp_path / "no.png", **call)
    assert not (tmp_path / "no.png").exists()


# what the encoder has no room for ------------------------------------------------------------------------------------


class Heard(logging.Handler):
    """A handler that keeps the messages it is given."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard(caplog):
    """Warnings of the pipeline's logger, which is below diffusers' own."""
    logger, handler = logging.getLogger("diffusers.latent_diffusion"), Heard()
    caplog.set_level(logging.WARNING, logger=logger.name)
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def test_what_is_cut_of_a_prompt_is_said_once_a_call(model, heard):
    pipeline = checkpoints.load(model)
    call = dict(num_inference_steps=1, output_type="latent")
    words = "across blank down stripes a picture of blank down across stripes of a picture across".split()
    tokens = pipeline.tokenizer
    fits = max(n for n in range(1, len(words)) if len(tokens(" ".join(words[:n])).input_ids) <= 12)
    pipeline(prompt=["stripes", " ".join(words[:fits])], negative_prompt=" ".join(words), guidance_scale=1.0, **call)
    assert heard == []  # the longest that fits, and a negative prompt that guidance 1 does not look at
    long, other = " ".join(words), " ".join(["stripes", *words])
    kept = tokens.decode(tokens(long, truncation=True).input_ids, skip_special_tokens=True).strip()
    (cut,) = pipeline.cut_off([long, "stripes", None, long])
    assert f"{kept} {cut}" == long and 0 < len(cut) < len(long)
    pipeline(prompt=["stripes", long, long], negative_prompt=other, guidance_scale=2.0, **call)
    (said,) = heard
    assert "takes 12 tokens" in said and repr(cut) in said and repr(pipeline.cut_off([other])[0]) in said
    both = pipeline(prompt=[long, kept], generator=[g for _ in range(2) for g in generators(0, range(1))], **call).images
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-5)  # it is what is said: the rest is drawn


def test_the_command_says_what_is_cut(model, here, capsys):
    main(["generate", "stripes " * 20, "--model", str(model), "--num-images", "3", "--batch-size", "1", "--steps", "1"])
    out, err = capsys.readouterr()
    assert out == "samples.png\n" and err.count("prompts lose these parts: ['stripes stripes") == 1


# no prompt among prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, "blank"])
def test_an_empty_prompt_among_others_is_drawn_alike_at_any_batch_size(model, negative):
    pipeline = checkpoints.load(model)
    call = dict(num_inference_steps=2, guidance_scale=4.0, negative_prompt=negative)
    drawn = []
    for size in (1, 2, 3, 4):
        parts = list(generate_batches(pipeline, ["", "down stripes"], 2, batch_size=size, **call))
        drawn.append(np.concatenate([images for images, _ in parts]).astype(int))
    for images in drawn[1:]:
        assert np.abs(images - drawn[0]).max() <= 1
    ((plain, _),) = generate_batches(pipeline, ["", "down stripes"], 2, num_inference_steps=2, guidance_scale=1.0)
    away = np.abs(drawn[0] - plain)  # unguided, the empty prompt's images are these, unless guided away from something
    assert (away[:2].max() <= 1) == (negative is None) and away[2:].max() > 1


@pytest.mark.parametrize("size", [1, 2])
def test_guidance_where_nothing_is_named_is_refused_at_any_batch_size(model, tmp_path, size):
    call = dict(num_images=1, steps=1, guidance=4.0, batch_size=size, progress=False)
    with pytest.raises(UserError, match="guidance_scale 4: there is no class or prompt"):
        generate(model, ["", " "], out=tmp_path / "x.npz", **call)
    assert not (tmp_path / "x.npz").exists()
    generate(model, ["", "stripes"], out=tmp_path / "x.npz", **call)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [-1, -1]


# a class beside prompts ----------------------------------------------------------------------------------------------


def test_a_label_goes_with_every_prompt(told_both, run, here):
    ask = ("generate", "blank stripes", "", "--model", told_both, "--num-images", 2, "--steps", 2, "--guidance", 3)
    run(*ask, "--label", "down", "--out", "a.npz")
    run(*ask, "--label", 2, "--batch-size", 3, "--out", "b.npz")
    run(*ask, "--label", "across", "--out", "c.npz")
    run(*ask, "--out", "d.npz")
    down, number, across, none = (np.load(here / f"{name}.npz") for name in "abcd")
    assert [file["arr_1"].tolist() for file in (down, number, across, none)] == [[2] * 4, [2] * 4, [0] * 4, [-1] * 4]
    assert np.abs(down["arr_0"].astype(int) - number["arr_0"]).max() <= 1
    assert all(np.abs(down["arr_0"].astype(int) - other["arr_0"]).max() > 1 for other in (across, none))
    pipeline = checkpoints.load(told_both)
    for k, prompt in enumerate(("blank stripes", "")):  # the seed is of the prompt, as without a class
        call = dict(guidance_scale=3.0, num_inference_steps=2, output_type="np")
        expected = pipeline([prompt] * 2, ["down"] * 2, generator=image_generators(0, prompt, 0, 2), **call).images
        assert np.abs(down["arr_0"][2 * k : 2 * k + 2].astype(int) - expected * 255).max() <= 1


def test_a_label_stands_in_the_names_of_files_and_of_a_grids_rows(told_both, run, here):
    ask = ("generate", "blank stripes", "", "--model", told_both, "--num-images", 1, "--steps", 1, "--label", "down")
    run(*ask, "--out", "folder")
    assert sorted(file.name for file in (here / "folder").iterdir()) == ["00000-down_blank_stripes.png", "00001-down.png"]
    run(*ask, "--out", "grid.png")
    without = [*ask[:-2], "--out", "plain.png"]
    run(*without)
    assert Image.open(here / "grid.png").width > Image.open(here / "plain.png").width  # for the longer name


def test_a_label_that_can_go_with_nothing_is_refused(told_both, model, diffusion_run, refused):
    ask = ("generate", "--steps", 1, "--num-images", 1, "--label")
    assert "--label: unknown class 'sideways'; the classes are: 0 across" in refused(
        *ask, "sideways", "stripes", "--model", told_both
    )
    for what in (["down"], ["stripes", "down"], ["--all-classes"]):
        assert "--label blank: classes are named already" in refused(*ask, "blank", *what, "--model", told_both)
    assert "--label down: this model has no classes" in refused(*ask, "down", "stripes", "--model", model)
    of_classes = diffusion_run / "model"
    assert "--label down: goes with prompts, and this model reads none" in refused(*ask, "down", "0", "--model", of_classes)
