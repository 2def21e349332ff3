"""GGUF files for llama.cpp: architecture, tensors, tokenizer, number formats."""
