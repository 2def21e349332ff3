"""What every error message owes its reader."""

from eigenslice.errors import EigensliceError


def check_message(error: EigensliceError, *found: str) -> None:
    """It says what was found, with these words in it, what is allowed and what to do next; on few lines."""
    for words in found:
        assert words in error.found, f"{words!r} is not in {error.found!r}"
    assert error.allowed
    assert error.next_step
    assert str(error).count("\n") == 2, str(error)
