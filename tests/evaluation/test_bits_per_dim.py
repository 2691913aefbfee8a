"""Bits per dimension through both stages: against linear-Gaussian models, where every number is known, and as a command."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, VQModel
from stripes import stripes
from tiny_models import tiny_unet, tiny_vae
from tiny_runs import write_stripes

from latentdiff import checkpoints
from latentdiff.data.shuffling import permutation
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.evaluation import bits_per_dim
from latentdiff.evaluation.bits_per_dim import BANDS, DiscretisedLogistic, fit_observation, pixel_bits, pixel_terms
from latentdiff.models.codec import LatentCodec
from latentdiff.schedules import make_schedule

NOISE = 0.3  # standard deviation of the linear model's pixels around its decoder


class LinearCodec:
    """x [B, 1, 2, 4] = W z + NOISE n with latents z [B, 2, 1, 2] ~ N(shift, scale^-2) per channel; q(z | x) is the posterior.

    W has orthogonal columns, so that the posterior is a diagonal Gaussian; `widened` multiplies q's deviations.
    """

    shift, scale = torch.tensor([0.5, -2.0]).double(), torch.tensor([3.0, 0.5]).double()
    vae = SimpleNamespace()

    def __init__(self, widened=1.0):
        columns = torch.linalg.qr(torch.randn((8, 4), generator=torch.Generator().manual_seed(0)).double())[0]
        self.matrix, self.widened = columns * torch.tensor([2.0, 0.3, 1.0, 0.7]), widened
        self.prior_mean, self.prior_std = self.shift.repeat_interleave(2), 1 / LinearCodec.scale.repeat_interleave(2)

    def moments(self, images):
        precision = self.prior_std**-2 + self.matrix.square().sum(0) / NOISE**2
        evidence = images.flatten(1) @ self.matrix / NOISE**2 + self.prior_mean * self.prior_std**-2
        std = self.widened * precision.rsqrt().expand(len(images), 4)
        return (evidence / precision).reshape(-1, 2, 1, 2), std.reshape(-1, 2, 1, 2)

    def normalise(self, z):
        return (z - LinearCodec.shift[:, None, None]) * LinearCodec.scale[:, None, None]

    def decode(self, z):
        raw = z / LinearCodec.scale[:, None, None] + LinearCodec.shift[:, None, None]
        return (raw.flatten(1) @ self.matrix.T).reshape(-1, 1, 2, 4)

    def log_prob(self, images):
        covariance = self.matrix @ (self.prior_std**2).diag() @ self.matrix.T + NOISE**2 * torch.eye(8).double()
        return torch.distributions.MultivariateNormal(self.matrix @ self.prior_mean, covariance).log_prob(images.flatten(1))


def gaussian(images, means):
    return torch.distributions.Normal(means, NOISE).log_prob(images).flatten(1).sum(1)


@pytest.fixture
def normal():
    """The exact denoiser of N(0, I), which is what the linear model's normalised latents are."""
    return Denoiser.from_score(lambda x, t: -x, make_schedule("vp"))


def pictures(n, seed=0):
    return torch.randn((n, 1, 2, 4), generator=torch.Generator().manual_seed(seed)).double()


def terms(codec, denoiser, x, **options):
    return pixel_terms(codec, denoiser, x, gaussian, torch.Generator().manual_seed(1), **options)


# The bound ------------------------------------------------------------------------------------------------------------


def test_the_bound_is_log_p_itself_where_q_is_the_posterior(normal):
    # Then log p(x|z) + log p(z) - log q(z|x) = log p(x) for every z, and no sampling error is left to hide in.
    codec, x = LinearCodec(), pictures(20)
    result = terms(codec, normal, x)
    total = result.decoder + result.prior + result.encoder
    torch.testing.assert_close(total, codec.log_prob(x), rtol=0, atol=1e-6)
    assert float(result.decoder.std()) > 0.5 and float(result.prior.std()) > 0.5  # each term does vary


def test_with_a_wrong_q_the_bound_misses_by_the_divergence(normal):
    r, x = 1.6, pictures(2).repeat(3000, 1, 1, 1)
    codec = LinearCodec(widened=r)
    result = terms(codec, normal, x)
    total = (result.decoder + result.prior + result.encoder).reshape(3000, 2)
    expected = codec.log_prob(x[:2]) - 4 * (0.5 * (r**2 - 1) - math.log(r))  # KL(q || posterior), 1.2 nats
    stderr = total.std(0) / math.sqrt(3000)
    assert float(((total.mean(0) - expected) / stderr).abs().max()) < 3 and float(stderr.max()) < 0.1


@pytest.mark.parametrize("bug", ["volume left out", "volume of one pixel", "entropy's sign", "z without noise"])
def test_planted_bugs_break_the_identity(monkeypatch, normal, bug):
    codec, x = LinearCodec(), pictures(20)
    right = bits_per_dim._draw
    if bug == "volume left out":
        codec.scale = torch.ones(2)
    elif bug == "volume of one pixel":
        codec.scale = LinearCodec.scale.sqrt()  # half of h * w = 2
    elif bug == "entropy's sign":
        monkeypatch.setattr(bits_per_dim, "_draw", lambda *a: (right(*a)[0], -right(*a)[1]))
    else:
        monkeypatch.setattr(bits_per_dim, "_draw", lambda codec, x, g: (codec.moments(x)[0], right(codec, x, g)[1]))
    result = terms(codec, normal, x)
    error = result.decoder + result.prior + result.encoder - codec.log_prob(x)
    assert float(error.abs().mean()) > 0.3


def test_the_border_is_not_data(normal):
    codec = LinearCodec()
    inner = terms(codec, normal, pictures(3), crop=lambda x: x[..., 1:3])
    whole = terms(codec, normal, pictures(3))
    means = codec.decode(codec.normalise(bits_per_dim._draw(codec, pictures(3), torch.Generator().manual_seed(1))[0]))
    torch.testing.assert_close(inner.decoder, gaussian(pictures(3)[..., 1:3], means[..., 1:3]))
    torch.testing.assert_close(inner.prior, whole.prior)


def test_without_a_posterior_there_is_no_bound(normal):
    vq = VQModel(1, 1, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (8,), latent_channels=4, norm_num_groups=4)
    with pytest.raises(UserError, match="VQModel has no posterior"):
        terms(LatentCodec(vq), normal, torch.zeros(1, 1, 8, 8))


# The observation model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.2, 0.9, 1.3])
@pytest.mark.parametrize("scale", [0.1, 3.0, 90.0])
def test_256_probabilities_sum_to_one(mean, scale):
    observation = DiscretisedLogistic(torch.full((1, BANDS), scale).double())
    values = (torch.arange(256).double() / 127.5 - 1).reshape(256, 1, 1, 1)
    log_p = observation(values, torch.full_like(values, mean))
    assert log_p.shape == (256,) and bool(log_p.isfinite().all())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


class PictureCodec:
    """A posterior of tiny width, and a decoder that gives the same means whatever the latents."""

    vae, scale = SimpleNamespace(), torch.ones(1)

    def __init__(self, means):
        self.means = means

    def moments(self, images):
        return torch.zeros(len(images), 1, 1, 1), torch.full((len(images), 1, 1, 1), 1e-3)

    def normalise(self, z):
        return z

    def decode(self, z):
        return self.means


def test_the_fit_finds_the_scales_that_made_the_data():
    g = torch.Generator().manual_seed(0)
    means = torch.rand((40, 2, 24, 24), generator=g).double() * 1.6 - 0.8
    scales = torch.where(means < 0, 2.0, 9.0) * torch.tensor([1.0, 3.0])[:, None, None]  # in levels, [40, 2, 24, 24]
    u = torch.rand(means.shape, generator=g).double()
    values = ((means + 1) * 127.5 + scales * torch.logit(u)).round().clamp(0, 255)
    images = values / 127.5 - 1
    fitted = fit_observation(PictureCodec(means), [(images, None)]).scales
    for channel, factor in enumerate((1.0, 3.0)):
        for bands, scale in ((slice(4, 15), 2.0), (slice(17, 28), 9.0)):
            torch.testing.assert_close(fitted[channel, bands], torch.full((11,), scale * factor).double(), rtol=0.25, atol=0)
    assert fitted.isfinite().all()  # bands that were never met, too
    better = DiscretisedLogistic(fitted)(images, means).mean()
    assert better > DiscretisedLogistic(torch.full_like(fitted, 6.0))(images, means).mean() + 50


def test_images_survive_the_trip_to_levels_exactly():
    values = torch.arange(256).reshape(1, 1, 16, 16)
    images = (values.float() / 127.5 - 1.0).expand(2, -1, -1, -1)  # as preprocessing makes them
    assert torch.equal(bits_per_dim._levels(images).round(), values.double().expand(2, -1, -1, -1))


# The command ----------------------------------------------------------------------------------------------------------

NAMES = ["across", "blank", "down"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_stripes(tmp_path_factory.mktemp("small") / "data", 40, size=6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 6x6 grey images padded to 8x8: what it costs is seconds, what it gives is not the point."""
    torch.manual_seed(0)
    rule = {"size": [6, 6], "channels": 1, "framing": "pad", "multiple_of": 4, "held_out": 0.25}
    return checkpoints.save(
        tmp_path_factory.mktemp("likelihood") / "model",
        tiny_unet(),
        tiny_vae(),
        DDIMScheduler(),
        {"config": {"data": rule}},
        NAMES,
        3,
        image_size=(6, 6),
        dtype=torch.float32,
    )


@pytest.fixture
def likelihood(run, tiny, data):
    def call(*options):
        return json.loads(run("likelihood", tiny, "--data", data, "--num-images", 4, "--rtol", 0.1, *options))

    return call


def test_the_command_prints_terms_total_errors_and_protocol(likelihood):
    report = likelihood()
    assert sum(term["bits_per_dim"] for term in report["terms"].values()) == pytest.approx(report["bits_per_dim"])
    assert report["bits_per_dim"] == pytest.approx(-report["nats"] / (36 * math.log(2)))
    assert len(report["terms"]) == 3 and all(term["stderr"] > 0 for term in report["terms"].values())
    assert report["stderr"] > 0 and report["stderr_probes"] is None  # one probe cannot tell its own error
    protocol = report["protocol"]
    expected = {"split": "test", "density": "log p(x | class)", "images": 4, "dims": 36, "seed": 0, "levels": 256, "rtol": 0.1}
    assert protocol.items() >= expected.items() and protocol["nfe"]["max"] >= protocol["nfe"]["mean"] >= 8
    assert protocol["posterior_draws"] == protocol["probes"] == 1 and "fitted on 30 training images" in protocol["observation"]


def test_the_numbers_are_a_function_of_the_images_and_the_seed_alone(likelihood):
    decoder, prior, encoder = (
        [report["terms"][name]["nats"] for report in (likelihood(), likelihood("--batch-size", 3), likelihood("--seed", 1))]
        for name in ("decoder: log p(x|z)", "prior: log p(z)", "encoder: -log q(z|x)")
    )
    for same, batched, other in (decoder, encoder):
        assert same == pytest.approx(batched, abs=1e-4) and abs(same - other) > 0.1
    # A random network swings with the timestep, so that rounding moves the solver's steps: it is right to its tolerance.
    assert prior[0] == pytest.approx(prior[1], abs=5) and abs(prior[0] - prior[2]) > 10


@pytest.mark.parametrize(
    "options", [("--seed", 1), ("--split", "train"), ("--unconditional",), ("--probes", 2), ("--rtol", 0.01)]
)
def test_every_option_changes_the_number(likelihood, options):
    report, other = likelihood(), likelihood(*options)
    assert other["bits_per_dim"] != report["bits_per_dim"]
    if options[0] == "--probes":
        assert other["stderr_probes"] > 0
    if options[0] == "--unconditional":
        assert other["protocol"]["density"] == "log p(x)"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--num-images", 11), "--num-images 11: must be from 1 to 10"),
        (("--split", "validation"), "--split validation: valid are test and train"),
        (("--probes", 0), "--probes and --batch-size at least 1"),
        (("--rtol", -1), "--rtol must be finite and above 0"),
    ],
)
def test_mistakes_of_a_user(refused, tiny, data, options, message):
    assert message in refused("likelihood", tiny, "--data", data, "--num-images", 4, *options)


def test_classes_that_are_not_the_models(run, refused, tiny, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "blank").rename(other / "empty")
    message = refused("likelihood", tiny, "--data", other)
    assert "its classes (across, down, empty) are not the model's (across, blank, down)" in message
    report = json.loads(run("likelihood", tiny, "--data", other, "--num-images", 1, "--rtol", 0.1, "--unconditional"))
    assert report["protocol"]["density"] == "log p(x)"


def test_one_image_has_no_standard_error(likelihood):
    report = likelihood("--num-images", 1)
    assert report["stderr"] is None and report["bits_per_dim"] is not None


def test_a_model_without_classes_and_one_without_a_null_class(tmp_path, run, refused, data):
    rule = {"size": [6, 6], "channels": 1, "framing": "pad", "multiple_of": 4, "held_out": 0.25}
    torch.manual_seed(0)
    plain = checkpoints.save(
        tmp_path / "plain",
        tiny_unet(num_class_embeds=None),
        tiny_vae(),
        DDIMScheduler(),
        {"config": {"data": rule}},
        image_size=(6, 6),
    )
    report = json.loads(run("likelihood", plain, "--data", data, "--num-images", 2, "--rtol", 0.1))
    assert report["protocol"]["density"] == "log p(x)"
    classes = checkpoints.save(
        tmp_path / "classes",
        tiny_unet(num_class_embeds=3),
        tiny_vae(),
        DDIMScheduler(),
        {"config": {"data": rule}},
        NAMES,
        image_size=(6, 6),
    )
    assert "--unconditional: this model" in refused("likelihood", classes, "--data", data, "--unconditional")


def test_images_are_measured_under_their_own_class():
    measured = []

    def denoiser_for(labels, count):
        measured.append(labels.tolist())
        return Denoiser.from_score(lambda x, t: -x, make_schedule("vp"))

    torch.manual_seed(0)
    train, test = stripes(20), stripes(12, 1)
    pixel_bits(LatentCodec(tiny_vae()), denoiser_for, train, test, 5, batch_size=2, tolerance=0.1)
    rows = permutation(12, 0, "likelihood")[:5]
    assert [len(labels) for labels in measured] == [2, 2, 1] and sum(measured, []) == test.labels[rows].tolist()
