"""Devices, processes, memory, progress, work folders: what every run needs."""
