"""Shards: parts of a corpus that several processes or machines encode side by side, each into a store of its own.

A shard's store lies below that of the corpus, in `shards/2-of-4`. Whoever fills the corpus's store next takes over what
shards hold, so their number may change from one run to the next, and one that was killed is worth what it has stored.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from speechbrain_mifuse.features.store import FeatureStore, StoreError
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress

logger = logging.getLogger(__name__)

SHARDS = "shards"
# Utterances between two flushes while frames are copied: encoding is slow and flushes often, copying is neither.
TOGETHER = 4096


class Shard(NamedTuple):
    """One of several parts of a corpus, equal in size up to chance.

    Example
    -------
    >>> parts = [Shard.parse("1/2"), Shard.parse("2/2")]
    >>> [part.holds("rav-03-01-05") for part in parts].count(True)
    1
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a shard as it is written on the command line."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard: '{text}' is no shard. Four of them are 1/4, 2/4, 3/4 and 4/4.")
        return cls(int(number), int(count))

    def holds(self, utt_id: str) -> bool:
        """Tell whether an utterance belongs to it, by the hash of its id: on every machine the same."""
        return int.from_bytes(hashlib.sha256(utt_id.encode()).digest()[:8], "big") % self.count == self.number - 1

    def folder(self, store: Path) -> Path:
        """Give the folder of its store."""
        return store / SHARDS / f"{self.number}-of-{self.count}"


def take_over_shards(store: FeatureStore) -> None:
    """Copy what shards hold into the store of the corpus, and empty them."""
    for about in sorted(store.folder.glob(f"{SHARDS}/*/store.json")):
        for folder in (about.parent, about.parent.parent):
            if folder.is_symlink():
                raise StoreError(f"{folder}: is a link, and what shards hold is moved. Remove the link.")
        logger.info("%s: taking over %s, as soon as nothing writes to it.", store.folder, about.parent.name)
        with FileLock(about.with_name("lock")):
            shard = FeatureStore(about.parent, store.fingerprint)
            _copy(shard, store)
            _empty(shard.folder)


def _copy(shard: FeatureStore, store: FeatureStore) -> None:
    wanted = {k: row for k, row in shard.rows.items() if store.rows.stamp(k) != row.file}
    with store.writer(TOGETHER) as add:
        for utt_id, row in progress(wanted.items(), desc=f"take over {shard.folder.name}", unit="clip"):
            add(utt_id, shard.frames(utt_id), row.audio, row.file)


def _empty(folder: Path) -> None:
    # The rows first: frames without rows are no damage. The lock stays, as another process may be waiting for it.
    for path in sorted(folder.glob("index*")) + sorted(folder.glob("*.f16")) + [folder / "store.json"]:
        path.unlink()
