"""The vocabulary cut: which tokens stay, the tokenizer's files, and the checkpoint with the remaining rows."""
