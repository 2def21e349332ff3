"""Reading and writing checkpoints: safetensors, GGUF, the hub."""
