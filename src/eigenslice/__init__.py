"""eigenslice makes transformer language models smaller and faster by SliceGPT (arXiv 2401.15024)."""

from eigenslice._version import __version__
from eigenslice.modeling import register

register()

__all__ = ["__version__"]
