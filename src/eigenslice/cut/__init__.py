"""Rotating and slicing the weights of blocks, embeddings and head."""
