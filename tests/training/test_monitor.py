"""The distance measured while training: the numbers of a pass by hand, alike on several processes, and the best state kept."""

import json

import pytest
import torch
from processes import carry_out, job
from tiny_runs import diffusion_config, diffusion_tree, write_yaml

from latentdiff.checkpoints import load
from latentdiff.errors import UserError
from latentdiff.evaluation.frechet import frechet
from latentdiff.models.feature_net import extract, load_features
from latentdiff.training import state, train
from latentdiff.training.images import Images
from latentdiff.utils.random import derive_seed, generators

WATCHED = {"train__steps": 6, "evaluate__every": 2, "evaluate__images": 14, "evaluate__reference": 40, "sample__guidance": 1.0}


def measured(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation/frechet" in line]


def test_the_distance_is_that_of_the_published_models_images(tmp_path, stripe_folder, autoencoder_run, feature_folder):
    changes = {**WATCHED, "evaluate__features": str(feature_folder), "train__best": "evaluation/frechet"}
    config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes)
    model = train(config)
    lines = measured(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    values = [line["evaluation/frechet"] for line in lines]
    assert len(set(values)) == 3 and len({line["evaluation/floor"] for line in lines}) == 1
    assert all(line["evaluation/seconds"] > 0 for line in lines)
    assert state.best_step(tmp_path / "run") == lines[values.index(min(values))]["step"]

    pipe, net, images = load(model), load_features(feature_folder), Images(config.data, 1)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        class_labels=[k % pipe.num_classes for k in range(14)],
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
        generator=generators(derive_seed(config.seed, "evaluate"), range(14)),
    ).images
    real = [
        part.batch(torch.linspace(0, len(part) - 1, min(n, len(part))).long())[0]
        for part, n in ((images.train, 40), (images.held_out, 14))
    ]
    made, reference, held = (extract(net, x)[0] for x in ((drawn * 255).round() / 127.5 - 1, *real))
    assert lines[0]["evaluation/floor"] == pytest.approx(frechet(held, reference), rel=1e-4)
    assert values[-1] == pytest.approx(frechet(made, reference), rel=0.02)  # published in float16


def test_processes_share_it_and_hold_the_same_number(tmp_path, stripe_folder, autoencoder_run, feature_folder):
    jobs = []
    for world in (1, 2):
        changes = {**WATCHED, "evaluate__features": str(feature_folder), "evaluate__images": 15, "optimizer__eps": 1e-3}
        tree = diffusion_tree(stripe_folder, tmp_path / f"run{world}", autoencoder_run, **changes)
        jobs.append(job(write_yaml(tmp_path / f"{world}.yaml", tree), world))
    assert [code for result in carry_out(jobs) for code in result["codes"]] == [0] * 3
    one, two = (measured(tmp_path / f"run{world}") for world in (1, 2))
    assert [line["step"] for line in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert b["evaluation/frechet"] == pytest.approx(a["evaluation/frechet"], rel=1e-3)
        assert b["evaluation/floor"] == pytest.approx(a["evaluation/floor"], rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__best": "evaluation/frechet"}, "train.best: evaluation/frechet is never measured; set evaluate.every"),
        ({"evaluate__every": 2}, "evaluate.features: name the folder of a feature network"),
        ({"evaluate__every": 2, "evaluate__features": "nowhere"}, "evaluate.features 'nowhere': no such folder"),
    ],
)
def test_settings_that_measure_nothing_are_refused_first(tmp_path, stripe_folder, autoencoder_run, changes, message):
    with pytest.raises(UserError, match=message):
        train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    assert not (tmp_path / "run").exists()
