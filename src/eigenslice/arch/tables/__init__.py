"""One file per family; each holds `TABLE`."""
