"""One file per family; each holds `TABLES`."""
