"""Walks a shard in a process of its own: pages that were written over end LMDB by SIGBUS or SIGSEGV, and then this process, not ours.

Run as a script with the shard's path and the names of tables; imports little, so that it starts at once.
It ends with 0, or with 1 and what is wrong on its output.
"""

import sys
from typing import Any

import lmdb


def walk(path: str, names: list[str]) -> str | None:
    """Touch every entry of these tables, where they are there, first and last byte; what is wrong, or None."""
    try:
        with lmdb.open(path, subdir=False, readonly=True, lock=False, create=False, readahead=False, max_dbs=2) as environment:
            for name in names:
                try:
                    table = environment.open_db(name.encode(), create=False)
                except lmdb.NotFoundError:
                    continue
                with environment.begin(db=table, buffers=True) as transaction:
                    if (wrong := _touch(transaction, transaction.stat(table)["entries"])) is not None:
                        return wrong
    except (lmdb.Error, ValueError) as error:
        return str(error)
    return None


def _touch(transaction: Any, expected: int) -> str | None:
    """In a damaged tree keys may go round in circles."""
    count = 0
    for key, value in transaction.cursor():
        _ = key[:1], value[:1], value[-1:]
        count += 1
        if count > expected:
            return f"it has more than its {expected:,} entries"
    return None if count == expected else f"it has {count:,} of its {expected:,} entries"


if __name__ == "__main__":
    found = walk(sys.argv[1], sys.argv[2:])
    if found is not None:
        print(found)
        sys.exit(1)
