"""Generation pipelines, one self-contained file each; the same file is saved into every checkpoint."""
