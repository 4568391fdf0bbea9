"""The inbox on the wire: one message is a batch of documents, in JSON Lines, as a field of a stream entry.

Written by `Producer`, by a shell with `redis-cli`, or by any language; read by the scheduler. docs/wire.md describes it.
Pure: no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from .connection import key_prefix
from .documents import KEYLESS_PREFIX, Cursor, Reject, SourceDocument, canonical_json
from .errors import ConfigurationError, InputRejected
from .messages import LANES, NAME, Lane
from .sources.fields import RecordRefused, check_id, encode_metadata, encode_text, name_type
from .sources.jsonl import LineRefused, parse_object

INBOX_VERSION = "1"
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
_DOCUMENT_FIELDS = {"id", "text", "metadata", "deleted", "group", "last"}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a batch, told to its producer. All of its documents are in one of these counts.

    repeated: documents that the dataset holds from an earlier admission under the same key; rejected: (id or None, reason).
    """

    key: str
    admitted: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0
    repeated: int = 0
    rejected: tuple[tuple[str | None, str], ...] = ()

    def to_json(self) -> str:
        rejected = [{"id": id_, "reason": reason} for id_, reason in self.rejected]
        return json.dumps({"v": 1, **asdict(self), "rejected": rejected}, ensure_ascii=True)

    @classmethod
    def from_json(cls, data: str) -> Receipt:
        """Raises ValueError for what is no receipt of this version."""
        record = json.loads(data)
        if not isinstance(record, dict) or record.pop("v", None) != 1:
            raise ValueError("not a receipt of version 1")
        rejected = tuple((entry.get("id"), str(entry.get("reason"))) for entry in record.pop("rejected"))
        names = ("key", "admitted", "updated", "unchanged", "deleted", "repeated")
        return cls(**{name: record[name] for name in names if name in record}, rejected=rejected)


@dataclass(frozen=True, slots=True)
class InboxMessage:
    """One entry of the inbox, read. refusal: why it is none; it has no records then.

    key, job: what can be used as such, also of a message that is refused: it has the job `main` then, and where its own key
    is none, the one of a message without. raw: its fields as they came, with bytes that are no UTF-8 as lone surrogates;
    lane: for a job that is new.
    """

    id: str
    key: str
    job: str
    lane: Lane
    reply: str
    records: tuple[SourceDocument | Reject, ...]
    raw: Mapping[str, str] = field(repr=False)
    refusal: str = ""


def inbox_key(namespace: str, name: str) -> str:
    """The stream of an inbox."""
    return f"{key_prefix(namespace)}:inbox:{name}"


def receipts_key(namespace: str, reply: str) -> str:
    """The stream of the receipts of one producer."""
    return f"{key_prefix(namespace)}:receipts:{reply}"


def check_inbox_name(name: str) -> str:
    """Raises ConfigurationError for a name that no inbox has."""
    if not NAME.fullmatch(name):
        raise ConfigurationError(f"inbox {name!r}: use letters, digits, dots, dashes and underscores, at most 100")
    return name


def check_key(key: object) -> str:
    """Raises InputRejected for what cannot be the idempotency key of a batch."""
    if not isinstance(key, str):
        raise InputRejected(f"the key must be a string, not {name_type(key)}")
    if key.startswith(KEYLESS_PREFIX):
        raise InputRejected(f"the key {key!r:.80} begins with {KEYLESS_PREFIX!r}, which stands for batches without one")
    try:
        return check_id(key)
    except RecordRefused as refused:
        raise InputRejected(f"the key cannot be used: {str(refused).replace('the id', 'it')}") from None


def encode_document(
    id: object,  # noqa: A002
    text: object = None,
    *,
    metadata: object = None,
    deleted: bool = False,
    group: object = None,
    last: bool = True,
) -> tuple[str, SourceDocument]:
    """A line of a batch, and what is read of it. Raises InputRejected, in one sentence, for what admission would reject."""
    record: dict[str, Any] = {"id": id}
    if deleted is not False:
        record["deleted"] = deleted
    if not deleted:
        record["text"] = text
    if metadata is not None:
        record["metadata"] = metadata
    if group is not None:
        record["group"] = group
    if last is not True:
        record["last"] = last
    try:
        document = _document(dict(record), Cursor(), "")
        record["id"] = document.id
        return canonical_json(record), document
    except (RecordRefused, TypeError, ValueError) as refused:
        shown = f" {id!r}" if isinstance(id, str) and len(id) <= 80 else ""
        raise InputRejected(f"document{shown} cannot be pushed: {refused}") from None


def passage_number(document: SourceDocument) -> int:
    """N of the passage GROUP#N; 0 for a document that is not split."""
    return 0 if document.group is None else int(document.id[len(document.group) + 1 :])


def read_message(message_id: str, fields: Mapping[str, str], *, inbox: str) -> InboxMessage:
    """An entry of the stream as a batch, whatever is in it. What is wrong with one document rejects that document only."""
    documents = fields.get("documents", "").encode("utf-8", "surrogateescape")
    lane: Lane = "live" if fields.get("lane") == "live" else "bulk"
    keyless = f"{KEYLESS_PREFIX}{message_id}/{blake2b(documents, digest_size=4).hexdigest()}"
    unusable = _reason_against_key(fields)
    refusal = _refusal(fields) or unusable
    records: tuple[SourceDocument | Reject, ...] = ()
    if not refusal:
        records = _records(documents, f"inbox:{inbox}/{message_id}")
        refusal = "" if records else "the field `documents` holds no document"
    key = keyless if unusable else fields.get("key") or keyless
    job = "main" if refusal else fields.get("job") or "main"
    reply = fields.get("reply", "")
    if not NAME.fullmatch(reply):
        reply = ""
    return InboxMessage(message_id, key, job, lane, reply, records, fields, refusal)


def _refusal(fields: Mapping[str, str]) -> str:
    if fields.get("v") != INBOX_VERSION:
        found = f"has version {fields['v']!r:.40}" if "v" in fields else "has no field `v`"
        return f"the message {found}; this embedmill reads version {INBOX_VERSION}"
    if "documents" not in fields:
        return "the message has no field `documents`"
    if not NAME.fullmatch(fields.get("job") or "main"):
        return "the field `job` is no job's name"
    if fields.get("lane", LANES[0]) not in LANES:
        return "the field `lane` is neither live nor bulk"
    return ""


def _reason_against_key(fields: Mapping[str, str]) -> str:
    try:
        if fields.get("key"):
            check_key(fields["key"])
    except InputRejected as refused:
        return str(refused)
    return ""


def _records(documents: bytes, place: str) -> tuple[SourceDocument | Reject, ...]:
    records: list[SourceDocument | Reject] = []
    for number, line in enumerate(documents.split(b"\n"), start=1):
        if not line or line.isspace():
            continue
        cursor = Cursor(record=len(records) + 1, line=number)
        identity: str | None = None
        try:
            record = parse_object(line)
            identity = _identity(record)
            records.append(_document(record, cursor, f"{place}:{number}"))
        except (LineRefused, RecordRefused) as refused:
            records.append(Reject(f"{place}:{number}", str(refused), cursor, identity))
    return tuple(_with_ends(records))


def _identity(record: dict[str, Any]) -> str | None:
    """The id to name in a refusal, where there is one."""
    try:
        return check_id(record.get("id"))
    except RecordRefused:
        return None


def _document(record: dict[str, Any], cursor: Cursor, place: str) -> SourceDocument:
    """A document of the wire. Raises RecordRefused."""
    unknown = record.keys() - _DOCUMENT_FIELDS
    if unknown:
        raise RecordRefused(f"unknown field {min(unknown)!r:.80}: what describes the document goes into `metadata`")
    if record.get("id") is None:
        raise RecordRefused("it has no id")
    identity = check_id(record["id"])
    group = None if record.get("group") is None else check_id(record["group"])
    deleted, last = record.get("deleted", False), record.get("last", True)
    if not isinstance(deleted, bool) or not isinstance(last, bool):
        raise RecordRefused("`deleted` and `last` are true or false")
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise RecordRefused(f"the metadata must be an object, not {name_type(metadata)}")
    if deleted:
        return SourceDocument(identity, "", "{}", cursor, place, deleted=True)
    if group is not None:
        _check_passage_id(identity, group)
    elif not last:
        raise RecordRefused("`last` is said of passages: name the document that it is a part of as `group`")
    text = _text(record.get("text"))
    encoded = encode_metadata(metadata) if metadata else "{}"
    return SourceDocument(identity, text, encoded, cursor, place, group=group, last=last)


def _check_passage_id(id_: str, group: str) -> None:
    """By the number in it, admission knows which passages a document has, when only some of them stand in a message."""
    stem, _, number = id_.rpartition("#")
    if stem != group or not number.isascii() or not number.isdecimal() or str(int(number[:9])) != number:
        raise RecordRefused(f"a passage of {group!r:.80} has the id GROUP#0, GROUP#1 and so on, not {id_!r:.80}")


def _text(text: object) -> str:
    if text is None:
        raise RecordRefused("it has no text")
    if not isinstance(text, str):
        raise RecordRefused(f"the text must be a string, not {name_type(text)}")
    if not text or text.isspace():
        raise RecordRefused("the text is empty")
    size = len(encode_text(text, what="the text"))
    if size > MAX_DOCUMENT_BYTES:
        raise RecordRefused(f"the text takes {size} bytes, the limit is {MAX_DOCUMENT_BYTES}")
    return text


def _with_ends(records: list[SourceDocument | Reject]) -> list[SourceDocument | Reject]:
    """Of passages of one group that stand together, only the last one ends it."""
    ended = list(records)
    for position, (record, following) in enumerate(pairwise(records)):
        if not isinstance(record, SourceDocument) or not isinstance(following, SourceDocument):
            continue
        if record.group is not None and record.group == following.group:
            ended[position] = replace(record, last=False)
    return ended
