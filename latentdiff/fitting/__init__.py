"""From a folder of pictures to an own model within a stated time: `latentdiff fit`."""
