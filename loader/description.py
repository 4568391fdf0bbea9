"""What a collection says about itself: whose vectors it holds, so that loading and searching can refuse the wrong ones.

JSON in the collection's description; Milvus Lite drops descriptions and keeps properties, so it goes there too.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedmill.dataset.layout import DatasetInfo
from embedmill.errors import ConfigurationError

DESCRIPTION_VERSION = 1
PROPERTY = "embedmill"
_MAX_NAME = 255
_SEARCHED_WITH = ("model", "dimensions", "revision", "options", "fingerprint")


@dataclass(frozen=True, slots=True)
class CollectionDescription:
    """creation: drawn anew for every collection created; a ledger counts for one creation only."""

    dataset_id: str
    fingerprint: str
    model: str
    dimensions: int
    revision: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    creation: str = ""

    @classmethod
    def of_dataset(cls, info: DatasetInfo) -> CollectionDescription:
        """The description of a collection that is about to be created for a dataset."""
        embedder = info.embedder
        return cls(
            dataset_id=info.id,
            fingerprint=embedder.fingerprint,
            model=embedder.model,
            dimensions=embedder.dimensions,
            revision=embedder.revision,
            options=dict(embedder.options),
            creation=uuid.uuid4().hex,
        )

    def to_json(self) -> str:
        record = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"embedmill": DESCRIPTION_VERSION, **record}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CollectionDescription | None:
        """None for a text that is not ours. Raises ConfigurationError for one of a newer release."""
        try:
            record = json.loads(text)
            version = record.pop("embedmill")
        except (ValueError, TypeError, AttributeError, KeyError):
            return None
        if version != DESCRIPTION_VERSION:
            raise ConfigurationError(
                f"the collection was made by a newer embedmill (format {version}): upgrade embedmill"
            )
        try:
            return cls(**{name: record[name] for name in cls.__slots__})
        except KeyError:
            return None

    def differences(self, wanted: CollectionDescription) -> list[str]:
        """What keeps the vectors of `wanted` out of this collection, each as `NAME OURS here, THEIRS in the dataset`."""
        found: list[str] = []
        for name in _SEARCHED_WITH:
            ours, theirs = getattr(self, name), getattr(wanted, name)
            if ours != theirs and not (name == "fingerprint" and found):
                found.append(f"{name} {ours!r} here, {theirs!r} in the dataset")
        return found

    def require(self, wanted: CollectionDescription, *, collection: str) -> None:
        """Raises ConfigurationError when the dataset of `wanted` does not belong into this collection."""
        differences = self.differences(wanted)
        if differences:
            raise ConfigurationError(
                f"collection {collection} holds vectors of another embedder ({'; '.join(differences)}): "
                "choose another one with --collection NAME"
            )
        if self.dataset_id != wanted.dataset_id:
            raise ConfigurationError(
                f"collection {collection} was loaded from another dataset (id {self.dataset_id[:8]}, and this one is "
                f"{wanted.dataset_id[:8]}): choose another one with --collection NAME, or drop it first"
            )


def default_collection(url: str) -> str:
    """A valid collection name made of a dataset's folder name."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", url.rstrip("/").rpartition("/")[2]).strip("_") or "dataset"
    return (name if not name[0].isdigit() else f"_{name}")[:_MAX_NAME]


def check_collection_name(name: str) -> str:
    """Raises ConfigurationError for a name that Milvus does not take."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or len(name) > _MAX_NAME:
        raise ConfigurationError(
            f"--collection {name!r} is not a collection name: letters, digits and _, not beginning with a digit"
        )
    return name
