"""Reads a foreign LMDB in a process of its own and answers over pipes: a damaged file ends LMDB by SIGBUS or SIGSEGV, and not us.

Run as a script with the file's path; imports little, so that it starts at once. Answers begin with "+", or with "-" and a reason.
"""

import os
import signal
import struct
import sys
from multiprocessing.connection import Connection
from typing import Any

import lmdb

COUNT = struct.Struct("<Q")
LENGTH = struct.Struct("<I")
KEYS_AT_ONCE = 1000
MAX_VALUE_BYTES = 1 << 30


def serve(path: str) -> None:
    """Greet with the number of entries; then answer "V" and a key with its value, "K" and a key with the keys after it."""
    requests, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    try:
        environment = lmdb.open(path, subdir=False, readonly=True, lock=False, create=False)
        needed, there = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"], os.path.getsize(path)
        if needed > there:
            answers.send_bytes(f"-it is truncated: it has {there:,} bytes of {needed:,}".encode())
            return
        with environment.begin(buffers=True) as transaction:
            answers.send_bytes(b"+" + COUNT.pack(transaction.stat()["entries"]))
            while True:
                answers.send_bytes(_answer(transaction, requests.recv_bytes()))
    except lmdb.Error as error:
        answers.send_bytes(f"-it is not a readable LMDB file ({error})".encode())
    except (EOFError, OSError):
        pass  # whoever asked is gone


def _answer(transaction: Any, request: bytes) -> bytes:
    try:
        return b"+" + (_value if request[:1] == b"V" else _keys)(transaction, request[1:])
    except (lmdb.Error, ValueError) as error:
        return f"-{error}".encode()


def _value(transaction: Any, key: bytes) -> bytes:
    value = transaction.get(key)
    if value is None or len(value) > MAX_VALUE_BYTES:
        raise ValueError("there is no value" if value is None else f"its value claims {len(value):,} bytes")
    return bytes(value)


def _keys(transaction: Any, after: bytes) -> bytes:
    """Up to ``KEYS_AT_ONCE`` keys, each behind its length; in a damaged tree they might go round in circles."""
    cursor = transaction.cursor()
    keys: list[bytes] = []
    there = cursor.set_range(after) if after else cursor.first()
    if there and after and bytes(cursor.key()) == after:
        there = cursor.next()
    while there and len(keys) < KEYS_AT_ONCE:
        key = bytes(cursor.key())
        if key <= after:
            raise ValueError("its keys are out of order")
        keys.append(LENGTH.pack(len(key)) + key)
        after, there = key, cursor.next()
    return b"".join(keys)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever asks decides
    serve(sys.argv[1])
