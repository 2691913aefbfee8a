"""From a folder of images to an own model within given hours: `latentdiff fit` (see `latentdiff.fitting.fit`)."""
