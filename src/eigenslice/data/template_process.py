"""Fills in chat templates in a process of its own, which can be ended: run as a file by `templates.py`.

A line of JSON comes for each conversation, and one goes back. A checkpoint's template is somebody else's program: it
can run for ever or fill the memory, and jinja's sandbox doesn't prevent that.
"""

import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

MEMORY = 2 * 2**30  # bytes beyond the memory that Python and transformers take
LONGEST = 2**24  # characters of one conversation


def limit_memory() -> None:
    """Have allocations fail where a template wants more than MEMORY; on Windows and macOS there is no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        import psutil

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def rendered(asked: dict[str, Any]) -> dict[str, str]:
    """Return `text`, or `error` with its cause, for `messages`, `tools`, `template` and `special` tokens."""
    stand_in: Any = SimpleNamespace(
        special_tokens_map=asked["special"], get_chat_template=lambda template, tools: template
    )
    try:
        text = PreTrainedTokenizerBase.apply_chat_template(
            stand_in, asked["messages"], tools=asked["tools"], chat_template=asked["template"], tokenize=False
        )
    except Exception as error:  # jinja's, and whatever expressions raise
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST]}
    if not isinstance(text, str) or len(text) > LONGEST:
        return {"error": f"it writes more than {LONGEST} characters"}
    return {"text": text}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may come between the answers
    limit_memory()
    print(json.dumps({"text": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(rendered(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
