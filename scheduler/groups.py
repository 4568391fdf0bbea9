"""Documents that come as several passages: what a new version of one no longer has, and its refusal as a whole.

The passages of a document stand one after the other in their reading; the last one says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from embedmill.documents import SourceDocument

# A document's passages follow each other; more than the last one matter only when a lost race is replayed.
_REMEMBERED = 4096


class Groups:
    """The document that is being read now, by the key of its reading and its id (the group of its passages)."""

    def __init__(self) -> None:
        self._seen: tuple[str, str, set[str]] = ("", "", set())
        self._refused: dict[tuple[str, str], str] = {}

    def see(self, reading_key: str, group: str, id_: str) -> None:
        """A passage of it was read."""
        if self._seen[:2] != (reading_key, group):
            self._seen = (reading_key, group, set())
        self._seen[2].add(id_)

    def refuse(self, reading_key: str, group: str, reason: str) -> None:
        """One of its passages was refused; those that follow are, too."""
        if len(self._refused) >= _REMEMBERED:
            del self._refused[next(iter(self._refused))]
        self._refused[reading_key, group] = reason

    def refusal(self, reading_key: str, group: str) -> str | None:
        """Why it is refused."""
        return self._refused.get((reading_key, group))

    def no_longer(self, record: SourceDocument, former: AbstractSet[str], *, was_whole: bool) -> list[str]:
        """Which ids go with its last passage, or with the document when it is not split.

        former: ids of the passages that it had; was_whole: its own id has been that of a document that was not split.
        """
        if record.group is None:
            return sorted(former - {record.id})
        if was_whole:
            # The document before it was split. A passage of another document may have that id, too, and stays.
            former = former | {record.group}
        # The passages GROUP#0 to GROUP#N may have been read before a restart.
        return sorted(former - self._seen[2] - {record.id} - set(_passages_upto(record.group, record.id)))


def _passages_upto(group: str, id_: str) -> Iterable[str]:
    """The ids GROUP#0 to GROUP#N of a passage GROUP#N; none for an id of another form."""
    stem, mark, number = id_.rpartition("#")
    if not mark or stem != group or not number.isdecimal() or len(number) > 9:
        return ()
    return (f"{group}#{n}" for n in range(int(number) + 1))
