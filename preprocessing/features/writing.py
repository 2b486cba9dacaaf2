"""What import and merge share: a store that is filled shard by shard."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.shard import shard_files
from megainter.data.feature_store.writer import FeatureStoreWriter, is_sealed, seal_store
from megainter.errors import TooManyBadInputsError
from megainter.tolerance import tolerated
from preprocessing.failures import write_failures

SHARD_BYTES = 64 << 30  # then the next shard is begun: a file that can still be copied
Encoded = tuple[str, bytes, int, int]  # id, record, CRC-32, regions

BOXES = "boxes"  # the setting of an extraction that holds the digest of its table of boxes


@dataclass(frozen=True)
class Imported:
    """What an import ends with: images in the store, entries listed as unusable and as repeated, and the store's digest."""

    stored: int
    bad: int
    repeated: int
    digest: str


@dataclass
class Account:
    entries: int = 0
    stored: int = 0
    bad: int = 0
    lacking: int = 0  # kept without some member
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        return len(self.failures) - self.bad - self.lacking


def list_failures(output: Path, account: Account) -> None:
    write_failures(output / "failed.tsv", ("image_id", "where", "reason"), account.failures)


def finish(output: Path, account: Account, max_bad: float, changed: bool) -> Imported:
    """Seal, unless too many were bad."""
    listed = f"{account.bad:,} of {account.entries:,} entries cannot be used, listed in {output / 'failed.tsv'}"
    if account.bad > tolerated(max_bad, account.entries):
        raise TooManyBadInputsError(f"{listed}: more than --max-bad {max_bad:g}; the others are kept: repair or allow more, and run again")
    if account.bad:
        print(listed, flush=True)
    if account.lacking:
        print(f"{account.lacking:,} entries lack a member that others have; they are kept, listed in {output / 'failed.tsv'}", flush=True)
    if account.repeated:
        print(f"{account.repeated:,} entries repeat an id; the first of each is kept, listed in {output / 'failed.tsv'}", flush=True)
    if changed or not is_sealed(output):
        seal_store(output)
    with FeatureStore(output) as store:
        return Imported(len(store), account.bad, account.repeated, store.digest)


def write_entries(output: Path, schema: StoreSchema, records: Iterator[Encoded]) -> int:
    """Add records to a store's last shard, and to a new one each time it has become large; returns how many."""
    written = 0
    while True:
        with FeatureStoreWriter(output, schema, _shard_to_fill(output)) as writer:
            for record in records:
                writer.add_encoded([record])
                written += 1
                if writer.shard.stat().st_size >= SHARD_BYTES:
                    break
            else:
                return written


def _shard_to_fill(output: Path) -> str:
    shards = shard_files(output)
    if shards and shards[-1].stat().st_size < SHARD_BYTES:
        return shards[-1].stem
    return f"shard-{int(shards[-1].stem.removeprefix('shard-')) + 1 if shards else 0:05d}"
