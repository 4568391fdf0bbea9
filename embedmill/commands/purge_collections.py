"""The collections of Milvus that a purge reaches: all are open before anything is erased."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from anyio import to_thread

from loader.address import parse_address
from loader.description import CollectionDescription, default_collection
from loader.target import CollectionState, MilvusTarget, open_target

from ..dataset import layout
from ..dataset.dataset import Dataset
from ..dataset.purging import Purge
from ..errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A collection that the dataset was loaded into. identity: of this creation of it."""

    uri: str
    collection: str
    identity: str

    def __str__(self) -> str:
        return f"collection {self.collection} of {self.uri}"


def loaded_collections(dataset: Dataset) -> list[Loaded]:
    """Every collection that was ever loaded from here."""
    store = dataset.store
    keys = [f"{layout.LOADS_FOLDER}/{name}/target.json" for name in store.names(layout.LOADS_FOLDER)]
    records = [layout.from_json(data, name=key) for key in keys if (data := store.read_or_none(key)) is not None]
    return [Loaded(str(r.get("uri")), str(r.get("collection")), str(r.get("identity"))) for r in records]


class Collections:
    """Those that were named, open and searchable. `missed`: those that nobody named."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._loaded = loaded_collections(dataset)
        self._reached: set[Loaded] = set()
        self._targets: list[MilvusTarget] = []

    @property
    def missed(self) -> list[Loaded]:
        return [loaded for loaded in self._loaded if loaded not in self._reached]

    @property
    def places(self) -> list[str]:
        """Where it is looked, for messages."""
        return list(dict.fromkeys(target.address.shown for target in self._targets))

    async def open(self, stack: AsyncExitStack, uri: str, collection: str | None) -> None:
        """Of one Milvus: this collection, else all that were loaded there. Raises ConfigurationError where there is none."""
        here = [loaded for loaded in self._loaded if loaded.uri == parse_address(uri).shown]
        names = [collection] if collection else sorted({loaded.collection for loaded in here})
        for name in names or [default_collection(self._dataset.url)]:
            target = await stack.enter_async_context(open_target(uri, collection=name, must_exist=True))
            state = await target.describe(name)
            is_ours = state is not None and self._is_ours(state)
            of_this_name = [loaded for loaded in here if loaded.collection == name]
            self._reached.update(of_this_name)
            if state is None or not is_ours:
                if of_this_name and not collection:
                    # Dropped since, or somebody else's by now: nothing of ours is there.
                    continue
                _refuse(uri, name, state, self._dataset)
            else:
                # The same server may have another name by now.
                self._reached.update(
                    one for one in self._loaded if (one.collection, one.identity) == (name, state.identity)
                )
                await target.make_searchable()
                self._targets.append(target)

    async def erase(self, work: Purge, ids: Sequence[str]) -> int | None:
        """Delete what was purged; how many rows are there after all, None where it was not looked."""
        if not self._targets:
            return None
        left = 0
        for target in self._targets:
            parts = await to_thread.run_sync(work.matching, await target.parts_of(ids))
            everything = sorted({*ids, *work.passages, *parts})
            await target.delete(everything)
            await target.flush()
            await target.compact()
            left += len(await target.vectors(everything))
        return left

    def _is_ours(self, state: CollectionState) -> bool:
        return state.description is not None and state.description.dataset_id == self._dataset.info.id


def _refuse(uri: str, name: str, state: CollectionState | None, dataset: Dataset) -> None:
    if state is None:
        raise ConfigurationError(f"{uri} has no collection {name}: name another one with --collection NAME")
    if state.description is not None:
        state.description.require(CollectionDescription.of_dataset(dataset.info), collection=name)
    raise ConfigurationError(
        f"collection {name} of {uri} was not loaded from {dataset.url}: name it with --collection NAME"
    )
