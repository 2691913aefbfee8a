"""The noise-aware classifier of latents: what it is, how it is trained, and guidance by it from the command line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import mixture
from tiny_runs import SIZE, change

from latentdiff.cli import main
from latentdiff.config import load_config, parse_config
from latentdiff.errors import UserError
from latentdiff.guidance import LatentClassifier, load_classifier
from latentdiff.schedules import make_schedule
from latentdiff.training import train
from latentdiff.training.train_classifier import _info, open_inputs
from latentdiff.utils.random import derive_seed


def tiny(seed=0, schedule="vp", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LatentClassifier(2, 3, {"name": schedule}, **{"widths": (8, 16), **changes}).eval()


def states(n=3, side=4):
    return torch.randn(n, 2, side, side, generator=torch.Generator().manual_seed(1))


def test_it_is_a_log_probability_of_each_row_alone():
    net, x, t = tiny(), states(), torch.tensor([0.1, 0.5, 0.9]).double()
    log_p = net.log_probs(x, t)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3))
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(x, t, labels), torch.stack([log_p[i, k] for i, k in enumerate(labels)]))
    for i in range(3):
        torch.testing.assert_close(net.log_probs(x[i : i + 1], t[i])[0], log_p[i], rtol=1e-5, atol=1e-6)
    assert (net.log_probs(x, 0.9) - net.log_probs(x, 0.1)).abs().max() > 1e-4  # it is told the noise level
    assert net.log_probs(states(side=3), 0.5).shape == (3, 3)  # any size of latent


def test_its_input_keeps_its_scale_where_the_noise_explodes():
    net, seen = tiny(schedule="ve"), []
    net.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.log_probs(states() * (1 + 50.0**2) ** 0.5, 1.0)
    torch.testing.assert_close(seen[0], states())


def test_saved_and_loaded(tmp_path):
    net, x = tiny(info={"class_names": ["a", "b", "c"]}), states()
    net.save(tmp_path / "classifier")
    back = load_classifier(tmp_path / "classifier")
    assert back.info == net.info and back.config == net.config and back.schedule.beta_max == 20.0
    assert torch.equal(back.log_probs(x, 0.3), net.log_probs(x, 0.3)) and not back.training
    assert not any(p.requires_grad for p in back.parameters())
    assert sorted(p.name for p in (tmp_path / "classifier").iterdir()) == ["config.json", "hashes.json", "model.safetensors"]


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda f: (f / "config.json").unlink(), "config.json: not found"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json: not the config of a classifier"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "model.safetensors: damaged"),
        (lambda f: tiny(widths=(8, 8)).save(f / "other") or shutil.copy(f / "other" / "config.json", f), "not the weights"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, harm, said):
    tiny().save(tmp_path)
    (tmp_path / "hashes.json").unlink()  # which would refuse any change
    harm(tmp_path)
    with pytest.raises(UserError, match=said):
        load_classifier(tmp_path)


def test_widths_are_checked():
    with pytest.raises(UserError, match="two multiples of 8"):
        tiny(widths=(12, 16))


def test_it_learns_the_class_posterior_at_every_noise_level():
    """Of a mixture: after 200 steps its cross-entropy is near that of the exact p(k | x_t), far below the prior's."""
    m, s, net = mixture((2, 4, 4)), make_schedule("vp"), tiny().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    g = torch.Generator().manual_seed(0)

    def draw(n):
        x0, k = m.draw(n, g)
        t = 0.3 + 0.7 * torch.rand(n, generator=g, dtype=torch.float64)
        wide = (-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
        return s.alpha(t).reshape(wide) * x0 + s.sigma(t).reshape(wide) * noise, t, k

    for _ in range(200):
        x, t, k = draw(64)
        (-net(x, t, k).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, t, k = draw(2000)
    with torch.no_grad():
        learnt = float(-net.eval()(x, t, k).mean())
        blind = float(-net(x, torch.full_like(t, 0.3), k).mean())
    truth = float(-m.posterior(x, s, t).log().gather(1, k[:, None]).mean())
    prior = float(-m.weights.log()[k].mean())
    assert truth < learnt < truth + 0.25 * (prior - truth)  # measured: 0.15
    assert blind > learnt + 0.01  # the noise level is used


# Training -----------------------------------------------------------------------------------------------------------


def tree(data, output, autoencoder, **changes):
    base = {
        "stage": "classifier",
        "output": str(output),
        "autoencoder": str(autoencoder),
        "data": {"source": str(data), "size": [SIZE, SIZE], "channels": 1, "held_out": 0.25},
        "model": {"widths": [8, 16]},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 60, "precision": "float32", "batch_size": 16, "threads": 1, "log_every": 10},
    }
    return change(base, changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, stripe_folder, autoencoder_run):
    output = tmp_path_factory.mktemp("classifier") / "run"
    return train(parse_config(tree(stripe_folder, output, autoencoder_run)))


def test_training_writes_what_it_learnt_and_how(trained, stripe_folder):
    classifier = load_classifier(trained)
    assert trained.name == "classifier" and classifier.config["channels"] == 2
    held = classifier.info["held_out"]
    assert held["images"] == 12 and held["nats"][0] < held["nats"][-1]
    assert sorted(classifier.info["class_names"]) == sorted(p.name for p in stripe_folder.iterdir())
    lines = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60] and lines[-1]["train/loss"] < lines[0]["train/loss"]


@pytest.mark.parametrize("use_mean", [False, True])
def test_it_is_measured_on_draws_of_the_posterior(trained, use_mean):
    """On draws, as it was trained; on means where cache.use_mean says so."""
    net = load_classifier(trained)
    config = parse_config(net.info["config"])
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"use_mean": use_mean})})
    codec, images = open_inputs(config, torch.device("cpu"))

    def moments(x):
        mean = x.mean((2, 3), keepdim=True).expand(-1, 2, 8, 8).contiguous()
        return mean, torch.full_like(mean, 0.7)  # wide posteriors, so that means and draws differ

    codec.moments = moments
    states = []
    log_probs = net.log_probs

    def watched(x, t):
        states.append(x)
        return log_probs(x, t)

    net.log_probs = watched
    _info(config, net, SimpleNamespace(codec=codec, images=images), torch.device("cpu"))
    mean, std = moments(images.held_out_batch(config.validation_images)[0])
    draw = torch.randn(std.shape, generator=torch.Generator().manual_seed(derive_seed("validation", "posterior")))
    x0 = codec.normalise(mean if use_mean else mean + std * draw)
    noise = torch.randn(std.shape, generator=torch.Generator().manual_seed(derive_seed("validation")))
    low, high = net.schedule.t_min, net.schedule.t_max
    t = torch.tensor([low + 0.1 * (high - low)], dtype=torch.float64)  # the first of its levels
    expected = net.schedule.alpha(t).float() * x0 + net.schedule.sigma(t).float() * noise
    assert len(x0) == 12 and torch.allclose(states[0], expected, atol=1e-5)


def test_training_is_a_function_of_its_config(trained, tmp_path, stripe_folder, autoencoder_run):
    def weights(output, **changes):
        changes = {"cache__folder": str(tmp_path / "latents"), **changes}
        folder = train(parse_config(tree(stripe_folder, tmp_path / output, autoencoder_run, train__steps=3, **changes)))
        return (folder / "model.safetensors").read_bytes()

    assert weights("a") == weights("b")
    assert weights("a2", seed=1) != weights("a3")
    assert weights("a4", noise_levels={"name": "logit_normal"}) != weights("a5")


def test_mistakes_are_named(trained, tmp_path, stripe_folder, autoencoder_run):
    with pytest.raises(UserError, match="trains in one go"):
        train(parse_config(tree(stripe_folder, trained.parent, autoencoder_run)))
    with pytest.raises(UserError, match="model.depth: unknown key; a classifier has only widths"):
        train(parse_config(tree(stripe_folder, tmp_path / "a", autoencoder_run, model__depth=3)))
    with pytest.raises(UserError, match="schedule: 'vpp' is unknown"):
        train(parse_config(tree(stripe_folder, tmp_path / "b", autoencoder_run, schedule={"name": "vpp"})))
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, path in enumerate(sorted(stripe_folder.rglob("*.png"))):
        shutil.copy(path, flat / f"{k}.png")
    with pytest.raises(UserError, match="has no classes"):
        train(parse_config(tree(flat, tmp_path / "c", autoencoder_run)))


def test_the_shipped_recipe_is_small():
    config = load_config("configs/fashion-mnist/classifier.yaml")
    diffusion = load_config("configs/fashion-mnist/diffusion.yaml")
    assert [config.schedule, config.data, config.cache, config.autoencoder] == [
        diffusion.schedule,
        diffusion.data,
        diffusion.cache,
        diffusion.autoencoder,
    ]
    net = LatentClassifier(8, 10, {"name": "flow"}, **config.model)
    assert sum(p.numel() for p in net.parameters()) < 0.5e6


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory, diffusion_run, trained):
    """A checkpoint with a classifier in its folder; the one trained above is told the checkpoint's own schedule."""
    folder = tmp_path_factory.mktemp("guided") / "model"
    shutil.copytree(diffusion_run / "model", folder)
    shutil.copytree(trained, folder / "classifier")
    return folder


def generate(model, out, *options):
    base = ["generate", "--all-classes", "--num-images", "2", "--steps", "4", "--model", str(model), "--out", str(out)]
    main([*base, *options])
    with np.load(out) as file:
        return file["arr_0"]


def test_classifier_guidance_from_the_command_line(model, tmp_path, capsys):
    plain = generate(model, tmp_path / "a.npz", "--sampler", "heun", "--guidance", "1")
    guided = generate(model, tmp_path / "b.npz", "--sampler", "heun", "--guidance", "1", "--classifier-strength", "3")
    assert not np.array_equal(plain, guided)
    few = ["--sampler", "heun", "--guidance", "1", "--classifier-strength", "3", "--batch-size", "4"]
    parts = generate(model, tmp_path / "c.npz", *few)
    assert np.abs(parts.astype(int) - guided).max() <= 1  # each image gets its own label, whatever the batch
    off = generate(model, tmp_path / "d.npz", "--sampler", "heun", "--guidance", "1", "--classifier-strength", "0")
    assert np.array_equal(off, plain)
    options = ["--sampler", "ddim", "--sampler-options", "eta=1e-1", "grid=uniform"]
    assert not np.array_equal(generate(model, tmp_path / "e.npz", *options), plain)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--classifier-strength", "1"], "has neither; add --sampler"),
        (["--sampler-options", "eta=1"], "has neither; add --sampler"),
        (["--sampler", "ddim", "--sampler-options", "eta"], "write each as key=value"),
        (["--sampler", "ddim", "--sampler-options", "churn=1"], "ddim has no option 'churn'; valid: eta"),
        (["--sampler", "ddim", "--sampler-options", "eta=[1]"], "ddim's eta must be a number such as 0.0, not [1]"),
        (["--sampler", "ddim", "--sampler-options", "steps=3"], "has no option 'steps'; give it by its own flag"),
        (["--sampler", "predictor_corrector", "--sampler-options", "corrector_steps=1.5"], "must be a whole number such as 1"),
        (["--sampler", "heun", "--sampler-options", "s_churn=true"], "s_churn must be a number"),
    ],
)
def test_the_command_line_refuses(model, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit):
        generate(model, tmp_path / "x.npz", *options)
    assert said in capsys.readouterr().err


def test_a_classifier_of_something_else_is_refused(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    ask = ("--sampler", "heun", "--classifier-strength", "1")
    for make, said in [
        (lambda: LatentClassifier(2, 3, {"name": "flow"}), "noise schedule RectifiedFlow, which is not that of the denoiser"),
        (lambda: LatentClassifier(2, 7, {"name": "ddpm-linear"}), "(channels, classes) (2, 7), and this model has (2, 3)"),
    ]:
        make().save(folder / "classifier")
        with pytest.raises(SystemExit):
            generate(folder, tmp_path / "x.npz", *ask)
        assert said in capsys.readouterr().err
    shutil.rmtree(folder / "classifier")
    with pytest.raises(SystemExit):
        generate(folder, tmp_path / "x.npz", *ask)
    assert "has no classifier; train one" in capsys.readouterr().err
