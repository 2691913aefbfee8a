"""The commands on a model over codes: what works as for any model, and what is refused in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.checkpoints import load
from latentdiff.data.transforms import Preprocess
from latentdiff.discrete import bound, make_process
from latentdiff.evaluation.bits_per_dim import code_terms
from latentdiff.models.codec import LatentCodec
from latentdiff.utils.random import generators


@pytest.fixture(scope="module")
def codes_model(discrete_run):
    return discrete_run / "model"


@pytest.fixture
def mask(tmp_path):
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


def test_generate_draws_classes_in_both_orders(run, codes_model, here):
    for order in ("random", "confidence"):
        run("generate", "down", "--model", codes_model, "--num-images", 2, "--sampler", order, "--out", f"{order}.npz")
    images = {order: np.load(here / f"{order}.npz")["arr_0"] for order in ("random", "confidence")}
    assert images["random"].shape == (2, 16, 16, 3) and not np.array_equal(images["random"], images["confidence"])
    run("generate", "down", "--model", codes_model, "--num-images", 2, "--batch-size", 1, "--out", "again.npz")
    assert np.array_equal(np.load(here / "again.npz")["arr_0"], images["random"])


def test_edit_with_a_mask_keeps_every_other_pixel(run, codes_model, stripe_folder, mask, here):
    image = sorted((stripe_folder / "across").glob("*.png"))[0]
    (here / "in").mkdir()
    (here / "in" / "a.png").write_bytes(image.read_bytes())
    run("edit", "in", "--model", codes_model, "--mask", mask, "--to", "down", "--out", "filled")
    (result,) = [path for path in (here / "filled").rglob("*.png") if "grid" not in path.name]
    assert np.array_equal(pixels_of(result)[:, 8:], pixels_of(image)[:, 8:])
    assert not np.array_equal(pixels_of(result)[:, :8], pixels_of(image)[:, :8])


def test_evaluate_measures_it_with_a_bound_on_bits(run, codes_model, stripe_folder, feature_folder, here):
    arguments = ("--num-images", 12, "--features", feature_folder, "--cas-seeds", 0, "--bits-images", 4, "--out", "report")
    report = json.loads(run("evaluate", codes_model, "--data", stripe_folder, *arguments))
    assert report["protocol"]["sampler"] == "random" and {"frechet", "label_accuracy"} <= {
        name.partition("[")[0] for name in report["metrics"]
    }
    likelihood = report["likelihood"]
    assert likelihood["protocol"]["nfe"]["mean"] == 64 and likelihood["terms"]["encoder: -log q(z|x)"]["nats"] == 0
    assert 0 < likelihood["bits_per_dim"] < 12
    assert "bits_per_dim" in json.loads((here / "report" / "metrics.json").read_text())["values"]


def test_the_bound_is_the_decoders_term_and_that_of_the_codes(codes_model):
    pipe = load(codes_model)
    codec, process = LatentCodec(pipe.vae), make_process("absorbing", pipe.num_codes)
    images = Preprocess((16, 16), 1)(np.full((16, 16, 1), 90, np.uint8))[None]
    seen = []

    def observation(x, means):
        seen.append(means)
        return -(x - means).double().square().flatten(1).sum(1)

    def predict(codes, t):
        return pipe.predict(codes, t, class_labels=torch.tensor([0]))

    terms = code_terms(codec, predict, process, images, observation, generators(0, [0]), samples=8)
    codes = codec.codes(images)
    assert torch.equal(seen[0], codec.decode_codes(codes))
    assert torch.equal(terms.decoder, -(images - seen[0]).double().square().flatten(1).sum(1))
    assert torch.equal(terms.prior, bound(predict, codes, process, 8, generators(0, [0]))) and float(terms.prior) < 0
    assert float(terms.encoder) == 0 and terms.nfe.tolist() == [8]


def test_info_says_what_it_is(run, codes_model, discrete_run):
    facts = json.loads(run("info", codes_model))
    assert facts["codes"] == 6 and facts["process"] == {"name": "absorbing", "schedule": "linear", "levels": "together"}
    assert facts["latent_shape"] == [1, 8, 8] and facts["scheduler"] == "random" and "prediction" not in facts
    cache = json.loads(run("info", discrete_run / "codes"))
    assert cache["shape"] == [1, 8, 8] and cache["mirrored"] and "mean" not in cache


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "down", "--sampler", "heun"), "sampler 'heun': this checkpoint draws codes; valid: random, confidence"),
        (("generate", "down", "--weak"), "--weak: this model draws codes"),
        (("generate", "down", "--guidance-rule", "apg"), "--guidance-rule: this model draws codes"),
        (("generate", "down", "--guidance-rescale", "0.5"), "--guidance-rescale: this model draws codes"),
        (("generate", "down", "--image-guidance", "2"), "--image-guidance: this model draws codes"),
        (
            ("edit", "IMAGE", "--to", "down", "--guidance", "2", "--guidance-rule", "apg"),
            "--guidance-rule: this model draws codes",
        ),
        (("edit", "IMAGE", "--to", "down", "--weak"), "--weak: this model draws codes"),
        (("edit", "IMAGE", "--task", "upscale"), "--task upscale: this model draws codes"),
        (("edit", "IMAGE", "--to", "down", "--task", "variations"), "--task variations: this model draws codes"),
        (("edit", "IMAGE", "--expand", "8", "0", "0", "0"), "--expand: this model draws codes"),
        (("gallery", "--data", "DATA", "--out", "gallery"), "draws codes, not latents"),
        (("likelihood", "--data", "DATA", "--rtol", "0.001"), "--rtol 0.001: is of the ODE of a model over latents"),
    ],
)
def test_what_needs_noise_is_refused_in_one_line(refused, codes_model, stripe_folder, arguments, said):
    names = {"IMAGE": next((stripe_folder / "across").glob("*.png")), "DATA": stripe_folder}
    words = [names.get(word, word) for word in arguments]
    words = [*words[:1], codes_model, *words[1:]] if words[0] in ("gallery", "likelihood") else [*words, "--model", codes_model]
    assert said in refused(*words)
