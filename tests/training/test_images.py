"""The images of a run: which are trained on."""

from tiny_runs import write_stripes

from latentdiff.config import DataConfig
from latentdiff.training.images import Images


def test_a_limit_keeps_images_of_each_class_and_leaves_the_held_out_alone(tmp_path):
    source = str(write_stripes(tmp_path / "stripes", 48))
    common = {"source": source, "size": (16, 16), "channels": 1, "held_out": 0.25}
    whole, few = Images(DataConfig(**common), 8), Images(DataConfig(**common, limit=9, copies=2, shift=0.1), 8)
    assert len(few.train) == 9 and len(few.samples) == 18
    assert set(few.train.indices.tolist()) < set(whole.train.indices.tolist())
    assert few.train.labels.bincount().min() >= 2
    assert few.held_out.indices.tolist() == whole.held_out.indices.tolist()
    assert Images(DataConfig(**common, limit=1000), 8).train.indices.tolist() == whole.train.indices.tolist()
