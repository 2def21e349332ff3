"""Devices, processes, memory, progress and work folders of every run."""
