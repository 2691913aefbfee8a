"""Finds the packages; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# pipelines/, configs/ and weights/ lie at the top of the repository; a wheel carries them inside the package
OUTSIDE = ("pipelines", "configs", "weights")

setup(
    packages=[*find_packages(include=["latentdiff", "latentdiff.*"]), *(f"latentdiff.{name}" for name in OUTSIDE)],
    package_dir={f"latentdiff.{name}": name for name in OUTSIDE},
)
