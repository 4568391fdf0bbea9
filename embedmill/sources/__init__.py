"""Where documents come from: files, folders, standard input, the documentation of the running Python."""

from .fields import FieldRules
from .opening import Source, open_source
from .rejects import RejectFile

__all__ = ["FieldRules", "RejectFile", "Source", "open_source"]
