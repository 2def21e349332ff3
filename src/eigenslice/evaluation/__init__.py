"""Perplexity, tasks of lm-eval, speed and costs of a model."""
