"""The choice of the tokens that stay."""

from collections.abc import Iterable, Mapping

from eigenslice.errors import OptionsError
from eigenslice.vocabulary.specification import Specification, closed, merged_from


def choose_tokens(
    specification: Specification, counts: Mapping[int, int], named: Iterable[int], number: int | None
) -> list[int]:
    """Return ids of the tokens that stay, in ascending order.

    Args:
        specification: The tokenizer.
        counts: Number of times that each token occurs in the texts, by id.
        named: Ids that configs name, such as the end of a text.
        number: Number of tokens that stay; None keeps all tokens that occur. Tokens that the tokenizer can't do without
            come first, then the most used tokens. Of two tokens with equal use, the lower id is first, which is the
            earlier merge. Each token brings the tokens that it is merged from, and is left out if these are too many.

    Raises:
        OptionsError: the tokenizer has fewer tokens, or can't do without more.
    """
    tokens, ids = specification.tokens, specification.ids
    needed = {*specification.indispensable, *(tokens[i] for i in named if i in tokens)}
    kept = closed(specification, needed)
    if number is None:
        kept |= closed(specification, (tokens[i] for i, count in counts.items() if count and i in tokens))
        return sorted(ids[token] for token in kept)
    if not len(kept) <= number <= len(tokens):
        raise OptionsError(
            f"--vocabulary {number}; the tokenizer has {len(tokens)} tokens",
            allowed=f"{len(kept)} (special and added tokens, bytes and letters always stay) to {len(tokens)}",
            next_step="choose another number, or let texts decide with --vocabulary-from alone",
        )
    for i in sorted(tokens, key=lambda i: (-counts.get(i, 0), i)):
        more = merged_from(specification, tokens[i]) - kept
        if len(kept) + len(more) <= number:
            kept |= more
        if len(kept) == number:
            break
    return sorted(ids[token] for token in kept)
