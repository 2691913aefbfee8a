"""What `latentdiff info CONFIG` is doing, on stderr: a line at each stage, since planning may take minutes."""

from __future__ import annotations

import sys
import threading

PATIENCE = 2.0  # seconds


class Progress:
    """Prints a line for each stage. Within the block the first ones are held back for a moment.

    A mistake in the config is mostly found in that moment, and is then the only line on stderr. What is held back is printed
    after PATIENCE, and as soon as nothing can be refused any more (`release`); it is dropped where the block ends in an error.
    """

    def __init__(self) -> None:
        self._held: list[str] | None = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self.release)
        self._timer.daemon = True

    def __call__(self, line: str) -> None:
        with self._lock:
            if self._held is not None:
                self._held.append(line)
                return
        print(f"info: {line}", file=sys.stderr, flush=True)

    def release(self) -> None:
        """Print what was held back; later lines are printed at once."""
        with self._lock:
            held, self._held = self._held or [], None
        for line in held:
            print(f"info: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._timer.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._timer.cancel()
        if kind is None:
            self.release()
