"""The models of a server, as the server knows them. The process that computes has them in memory: see `jobs.models`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from latentdiff.web.facts import Facts, Folders, read_facts
from latentdiff.web.jobs.models import facts
from latentdiff.web.worker import Worker


class OfferedModels(Folders):
    """The models that the page offers, and what it needs to know of each."""

    def __init__(self, folders: Mapping[str, Path], worker: Worker):
        """
        Args:
            folders: {name: folder of a checkpoint}.
            worker: the process that loads them.
        """
        super().__init__(folders)
        self._worker = worker
        self._guard = threading.Lock()
        self._facts: dict[str, Facts] = {}

    def facts(self, name: str) -> Facts:
        """The facts of a model. UserError for an unknown one, or for one whose files are damaged."""
        folder = self.folder(name)
        with self._guard:
            known = self._facts.get(name)
        if known is None:
            # Mostly its files say it. Else the process loads the model, or says what is wrong with it
            known = read_facts(name, self.shown(name), folder) or self._worker.call(partial(facts, name=name))
            with self._guard:
                self._facts[name] = known
        return known
