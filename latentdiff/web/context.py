"""What every tab of the page is given: the models, the folder of runs, the limits, and the way to run a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.web.jobs.job import Job, Update
from latentdiff.web.jobs.models import Models
from latentdiff.web.limits import Limits
from latentdiff.web.models import OfferedModels
from latentdiff.web.work import Work


@dataclass(frozen=True)
class Context:
    """The settings of a server.

    Attributes:
        models: the models, by name.
        runs: the folder whose runs are shown; None for none.
        limits: of a request.
        work: runs the requests of visitors.
        data: the data set of the models, whose images visitors may see; None for none.
    """

    models: OfferedModels
    runs: Path | None
    limits: Limits
    work: Work
    data: str | None = None

    def run(self, visitor: str | None, function: Callable[[Models, Job], Any]) -> Iterator[Update]:
        """Run function(models, job) for a visitor. See `Work.run`."""
        return self.work.run(visitor, function)
