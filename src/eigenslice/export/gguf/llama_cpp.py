"""Running a GGUF in llama.cpp, by PyPI's xllamacpp, which is llama.cpp's server in this process."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from eigenslice.errors import ExportError, OptionsError

FORCE = 1e6
"""Bias that makes a token the most likely one."""


def require() -> Any:
    """The module xllamacpp.

    Raises:
        OptionsError: it isn't installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise OptionsError(
            f"a GGUF is checked in llama.cpp, and xllamacpp can't be imported ({error})",
            allowed="export with xllamacpp, or --no-check",
            next_step="pip install 'eigenslice[gguf]'",
        ) from error
    return xllamacpp


class LlamaCpp:
    """A GGUF file, loaded.

    Args:
        path: The file.
        context: Tokens that fit.
        exact: Compute attention, and keep keys and values, in float32 instead of float16.
        threads: CPU threads.
        gpu_layers: Layers to run on a GPU.
    """

    def __init__(
        self, path: Path, context: int = 256, exact: bool = False, threads: int = 1, gpu_layers: int = 0
    ) -> None:
        runtime = require()
        options = runtime.CommonParams()
        options.model.path = str(path)
        options.n_ctx = context
        options.n_parallel = 1
        options.n_gpu_layers = gpu_layers
        options.fit_params = False
        options.warmup = False
        options.verbosity = -1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        if exact:
            options.cache_type_k = options.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
            options.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = runtime.Server(options)
        except RuntimeError as error:
            raise ExportError(
                f"llama.cpp doesn't load {path.name} ({error})",
                allowed="files that llama.cpp runs",
                next_step="report it with the model's config.json; transformers and vLLM run the folder itself",
            ) from error
        self._letter = self.tokenize("a")[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None  # its destructor stops the threads

    def complete(self, ids: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """llama-server's answer to a prompt of token ids: so many tokens, greedily; options are the server's."""
        assert self._server is not None
        request = {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True} | options
        answer = self._server.handle_completions(request)
        return json.loads(answer) if isinstance(answer, str | bytes) else answer

    def _forced(self, ids: Sequence[int], token: int, likely: int) -> dict[str, Any] | None:
        """Return the server's answer for a next token that it is made to choose; its probabilities are without this
        bias.

        None if the token is only a part of a character: the server then waits for the rest.
        """
        answer = self.complete(ids, 1, n_probs=likely, logit_bias=[[token, FORCE]])
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        logprobs = answer["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else None

    def next_tokens(self, ids: Sequence[int], likely: int) -> dict[int, float]:
        """Log-probabilities, in nats, of the most likely tokens after these; the first one is the most likely."""
        answer = self._forced(ids, self._letter, likely)
        if answer is None:
            raise RuntimeError(f"llama.cpp tells nothing of token {self._letter}")
        return {token["id"]: token["logprob"] for token in answer["top_logprobs"]}

    def log_probability(self, ids: Sequence[int], token: int, vocabulary: int) -> float:
        """Log-probability, in nats, of a token after these."""
        answer = self._forced(ids, token, 1)
        return self.next_tokens(ids, vocabulary)[token] if answer is None else answer["logprob"]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        assert self._server is not None
        request = urllib.request.Request(
            self._server.listening_address + "/tokenize",
            json.dumps({"content": text, "add_special": True, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["tokens"]
