"""Python's garbage collection, paused while libraries are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Within the block, Python does not search for objects that only refer to each other.

    Importing torch, diffusers and transformers makes hundreds of thousands of objects that stay. Searching them again and again
    is a fifth of the time until a command begins. It is for the start alone: in long work such objects may hold tensors.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
