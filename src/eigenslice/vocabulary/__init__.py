"""The vocabulary cut: which tokens stay, the tokenizer's files, and the checkpoint with the remaining rows."""

from eigenslice.vocabulary.cut import cut_vocabulary, stage_files
from eigenslice.vocabulary.kept_source import SourceOfKeptTokens, keep_rows, kept_ids

__all__ = ["SourceOfKeptTokens", "cut_vocabulary", "keep_rows", "kept_ids", "stage_files"]
