"""Configs: every mistake is one line that names the key and what would be valid."""

from pathlib import Path

import pytest
import yaml
from tiny_runs import autoencoder_tree, change, diffusion_tree, write_yaml

from latentdiff.config import Config, load_config, parse_config
from latentdiff.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


def diffusion(**changes):
    return change(diffusion_tree(Path("images"), Path("out"), Path("stage1")), changes)


def refusal(tree) -> str:
    with pytest.raises(UserError) as error:
        parse_config(tree, "my.yaml")
    assert "\n" not in str(error.value) and str(error.value).startswith("my.yaml: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"predicton": "flow"}, "predicton: unknown key; did you mean 'prediction'?"),
        ({"train__batchsize": 8}, "train.batchsize: unknown key; did you mean 'batch_size'?"),
        ({"schedule": {"name": "flow", "parms": {}}}, "schedule.parms: unknown key; did you mean 'params'?"),
        ({"cache__foldr": "x"}, "cache.foldr: unknown key; did you mean 'folder'?"),
        ({"ema__qqqq": 1}, "ema.qqqq: unknown key; valid keys: decay, power"),
    ],
)
def test_an_unknown_key_names_the_nearest(changes, said):
    assert refusal(diffusion(**changes)).endswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__steps": "many"}, ("train.steps: must be a whole number", "'many'")),
        ({"data__flips": "maybe"}, ("data.flips: must be true or false", "'maybe'")),
        ({"data__size": 16}, ("data.size: must be a list of numbers", "16")),
        ({"data__size": [16, 16, 3]}, ("data.size: must be a list of 2 values", "[16, 16, 3]")),
        ({"train__steps": 0}, ("train.steps: ", "greater than 0")),
        ({"prediction": "noise"}, ("prediction: ", "'v_prediction'", "'noise'")),
        ({"data__channels": 2}, ("data.channels: ", "1 or 3")),
        ({"data__size": [16]}, ("data.size: must have more values", "[16]")),
        ({"data__size": [16, 0]}, ("data.size.1: ", "greater than 0")),
        ({"optimizer__betas": [0.9, 1.0]}, ("optimizer.betas.1: ", "less than 1")),
        ({"optimizer__eps": 0}, ("optimizer.eps: ", "greater than 0")),
        ({"sample__guidance_interval": [0.8, 0.2]}, ("sample.guidance_interval: ", "low <= high", "[0.8, 0.2]")),
        ({"ema__decay": 1.0}, ("ema.decay: ", "less than 1")),
        ({"data": None}, ("data: ",)),
        ({"stage": "difusion"}, ("stage: 'difusion' is not one of autoencoder, diffusion, discrete, features",)),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_valid(changes, said):
    message = refusal(diffusion(**changes))
    assert all(part in message for part in said), message


def test_a_required_key_that_is_missing_is_named():
    tree = diffusion()
    del tree["train"]["steps"]
    assert refusal(tree) == "my.yaml: train.steps: this key is required"


def test_stage_1_keys_are_looked_up_in_stage_1():
    tree = autoencoder_tree(Path("images"), Path("out"), loss__perceptul=1.0)
    assert refusal(tree).endswith("loss.perceptul: unknown key; did you mean 'perceptual'?")


def test_a_missing_file_names_the_nearest(tmp_path):
    write_yaml(tmp_path / "diffusion.yaml", diffusion())
    with pytest.raises(UserError, match=r"difusion.yaml: no such config file; did you mean .*diffusion.yaml\?"):
        load_config(tmp_path / "difusion.yaml")
    with pytest.raises(UserError, match="nothing.yaml: no such config file$"):
        load_config(tmp_path / "folder" / "nothing.yaml")


@pytest.mark.parametrize("text", ["stage: [", "- stage", "", "\ttabs: 1"])
def test_a_file_that_is_not_a_yaml_mapping_is_one_line(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match="bad.yaml: ") as error:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_overrides_replace_and_add_values_of_their_type(tmp_path):
    path = write_yaml(tmp_path / "run.yaml", diffusion())
    config = load_config(
        path,
        [
            "train.steps=9",
            "cache.folder=there",
            "data.flips=true",
            "data.size=[8, 24]",
            "noise_levels={name: logit_normal, params: {mean: 0.5}}",
            "optimizer.lr=1e-4",
            "model.config.layers_per_block=2",
            "optimizer.clip=null",
        ],
    )
    assert config.train.steps == 9 and config.cache.folder == "there" and config.data.flips is True
    assert config.data.size == (8, 24) and config.noise_levels.params == {"mean": 0.5}
    assert config.optimizer.lr == 1e-4 and config.optimizer.clip is None  # YAML takes 1e-4 for a string
    assert config.model.config["layers_per_block"] == 2 and config.model.config["block_out_channels"] == [8, 16]
    assert load_config(path).train.steps == 6


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("train.steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("output.folder=x", "output is a value, not a section"),
        ("train.steps=[", "not valid YAML"),
        ("train.stps=3", "train.stps: unknown key; did you mean 'steps'?"),
    ],
)
def test_a_bad_override_is_one_line(tmp_path, item, said):
    path = write_yaml(tmp_path / "run.yaml", diffusion())
    with pytest.raises(UserError) as error:
        load_config(path, [item])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_the_configs_that_ship_are_valid(path):
    config = load_config(path)
    assert isinstance(config, Config)
    assert parse_config(config.model_dump(mode="json")) == config  # what run.json holds is the config again
    text = yaml.safe_load(path.read_text())
    assert not Path(text["output"]).is_absolute()


def test_configs_do_ship():
    assert {"fashion-mnist", "folder"} <= {p.parent.name for p in CONFIGS.rglob("*.yaml")}
