"""Where documents come from: files, folders, object stores, standard input, the documentation of the running Python."""

from .chunks import Chunking
from .fields import FieldRules
from .opening import Source, open_source
from .rejects import RejectFile

__all__ = ["Chunking", "FieldRules", "RejectFile", "Source", "open_source"]
