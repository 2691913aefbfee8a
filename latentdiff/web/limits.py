"""What a visitor may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from latentdiff.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        images: images of one request.
        steps: steps of the sampler.
        pixels: pixels of all images of one request, and of one uploaded picture.
        upload: bytes of one uploaded file.
        queue: requests that may wait.
    """

    images: int = 64
    steps: int = 250
    pixels: int = 16_000_000
    upload: int = 20_000_000
    queue: int = 16

    def check_images(self, images: int, pixels_each: int = 0) -> None:
        """UserError for more images, or more pixels in all of them, than one request may have."""
        if not 1 <= images <= self.images:
            raise UserError(f"number of images {images}: must be from 1 to {self.images}, the server's --max-images")
        if images * pixels_each > self.pixels:
            raise UserError(
                f"number of images {images}: they have {images * pixels_each:,} pixels together; at most {self.pixels:,} are "
                "allowed, the server's --max-pixels"
            )

    def check_steps(self, steps: int) -> None:
        """UserError for more steps than a request may have, or none."""
        if not 1 <= steps <= self.steps:
            raise UserError(f"steps {steps}: must be from 1 to {self.steps}, the server's --max-steps")
