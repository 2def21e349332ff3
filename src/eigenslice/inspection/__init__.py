"""The content of a checkpoint, the size of its results, and the time and memory of a run."""
