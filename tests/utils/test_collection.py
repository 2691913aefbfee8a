"""Garbage collection is off only while something is imported."""

import gc

import pytest

from latentdiff.checkpoints import check
from latentdiff.errors import UserError
from latentdiff.utils import collection


def test_collection_is_off_within_the_block_and_on_after_it_even_if_it_fails():
    with pytest.raises(ZeroDivisionError), collection.paused():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()


def test_a_block_within_another_does_not_end_the_outer_one():
    with collection.paused():
        with collection.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_for_a_user_who_has_switched_it_off():
    gc.disable()
    try:
        with collection.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_refused_checkpoint_leaves_it_on(tmp_path):
    with pytest.raises(UserError):
        check(tmp_path)
    assert gc.isenabled()
