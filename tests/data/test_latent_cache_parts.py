"""A latent cache built in parts by jobs that never meet."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import diffusion_tree, write_stripes, write_yaml

from latentdiff.cli import main
from latentdiff.data.latent_cache import open_cache
from latentdiff.data.tensor_shards import shard_path


def test_parts_make_the_cache_that_one_job_makes(tmp_path, stripe_folder, autoencoder_run, capsys):
    trees = {
        name: diffusion_tree(stripe_folder, tmp_path / name, autoencoder_run, cache__shard_size=8)  # 36 images: 5 shards
        for name in ("whole", "parts")
    }
    configs = {name: str(write_yaml(tmp_path / f"{name}.yaml", tree)) for name, tree in trees.items()}
    main(["encode", configs["whole"]])
    for part, missing in (("2/3", 3), ("3/3", 2)):
        main(["encode", configs["parts"], "--part", part])
        assert f"part {part}: {missing} shards of other parts are missing" in capsys.readouterr().err
        assert not (tmp_path / "parts" / "latents" / "manifest.json").exists()
    main(["encode", configs["parts"], "--part", "1/3"])
    assert "part 1/3: the cache is finished" in capsys.readouterr().err
    whole, parts = (tmp_path / name / "latents" for name in ("whole", "parts"))
    assert len(open_cache(parts)) == 36
    for number in range(5):
        assert shard_path(parts, number).read_bytes() == shard_path(whole, number).read_bytes()
    assert (parts / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_refused(tmp_path, stripe_folder, autoencoder_run, part, capsys):
    config = write_yaml(tmp_path / "run.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run))
    with pytest.raises(SystemExit) as stopped:
        main(["encode", str(config), f"--part={part}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and f"--part {part}: write it as K/N" in said
    assert not (tmp_path / "run").exists()


def test_what_other_parts_could_not_read_is_in_the_manifest(tmp_path, autoencoder_run, capsys):
    data = write_stripes(tmp_path / "data", 48)
    files = sorted(data.rglob("*.png"))
    for file in (files[1], files[-2]):  # in the first shard and in the last
        jpeg = file.with_suffix(".jpg")
        Image.open(file).convert("L").save(jpeg, quality=95)
        whole = jpeg.read_bytes()
        # Begins and ends as a JPEG does, and has no pixels: that shows only when they are read
        jpeg.write_bytes(whole[: whole.index(b"\xff\xda") + 4] + whole[-2:])
        file.unlink()
    changes = {"cache__shard_size": 8, "data__max_bad_share": 0.2, "data__held_out": 0.02}
    config = str(write_yaml(tmp_path / "run.yaml", diffusion_tree(data, tmp_path / "run", autoencoder_run, **changes)))
    for part in ("1/2", "2/2"):
        main(["encode", config, "--part", part])
    capsys.readouterr()
    unreadable = json.loads((tmp_path / "run" / "latents" / "manifest.json").read_text())["unreadable"]
    assert [Path(name).suffix for name in unreadable] == [".jpg"] * 2
