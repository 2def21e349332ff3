"""Plans: the sizes of a result, decided before a weight is touched."""
