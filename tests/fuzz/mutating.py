"""Changes that keep a document a document, so that what stands behind the syntax is reached."""

import json
import pickletools
import random
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 255, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"),
    "", "0", "1", "-1", "a", "1e9", "nan", "NaN", "\0", "\ud800", "\u202e", "\x1b[31m", "a\nb", "../../x", "/etc/passwd", "x" * 5000,
    "9" * 5000, "AAAAAAAAAAA=", [], {}, [0], [[]], [{}], [None], {"": None}, {"a": {}}, [1, 2, 3, 4], ["a", "b"], [0.0] * 4, [[0, 0, 1, 1]],
]  # fmt: skip


def mutate_json(data: bytes, random: random.Random) -> bytes:
    """One to four parts of a JSON document replaced, removed, doubled or renamed; ``ValueError`` where it is none."""
    document = json.loads(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        document = _changed(document, random)
    return json.dumps(document).encode()


def mutate_json_line(data: bytes, random: random.Random) -> bytes:
    """``mutate_json`` of one line of several."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = mutate_json(lines[place], random)
    return b"\n".join(lines)


def mutate_json_cell(data: bytes, random: random.Random) -> bytes:
    """``mutate_json`` of what stands behind the first tab of one line."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    key, tab, text = lines[place].partition(b"\t")
    lines[place] = key + tab + mutate_json(text, random)
    return b"\n".join(lines)


def behind(first: int, mutate: Mutate) -> Mutate:
    """``mutate`` of what stands behind the ``first`` bytes, which are for the target to choose by."""
    return lambda data, random: data[:first] + mutate(data[first:], random)


def _changed(value: Any, random: random.Random) -> Any:
    """``value`` with something changed at some depth."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        action = random.random()
        if action < 0.12:
            return {name: item for name, item in value.items() if name != key}
        if action < 0.2:
            return value | {random.choice(("", key + "x", key[:-1], *value)): random.choice(ODD)}
        return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place, action = random.randrange(len(value)), random.random()
        if action < 0.1:
            return value[:place] + value[place + 1 :]
        if action < 0.2:
            return value[:place] + [value[place]] * random.choice((2, 3, 50)) + value[place + 1 :]
        return [*value[:place], _changed(value[place], random), *value[place + 1 :]]
    return random.choice(ODD)


def mutate_pickle(data: bytes, random: random.Random) -> bytes:
    """One to three opcodes of a pickle removed, doubled, moved, exchanged or given another argument; ``ValueError`` where it is none."""
    ends = [at for _, _, at in pickletools.genops(data) if at is not None]
    parts = [data[first:end] for first, end in zip(ends, [*ends[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3))):
        place, action = random.randrange(len(parts)), random.random()
        if action < 0.2 and len(parts) > 1:
            del parts[place]
        elif action < 0.4:
            parts.insert(place, parts[random.randrange(len(parts))])
        elif action < 0.55:
            other = random.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif action < 0.8:
            parts[place] = random.choice(OPCODES)
        else:
            part = bytearray(parts[place])
            part[random.randrange(len(part))] = random.choice((0, 1, 2, 0x7F, 0x80, 0xFF, random.randrange(256)))
            parts[place] = bytes(part)
    return b"".join(parts)


# Of each kind one, with arguments that are short or lie about what follows.
OPCODES = [
    b"(", b".", b"0", b"1", b"2", b"N", b"R", b"a", b"b", b"d", b"}", b"e", b"]", b"l", b"o", b"s", b"t", b")", b"u", b"Q", b"\x81",
    b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"\x97", b"\x98", b"I7\n",
    b"I01\n", b"F1.5\n", b"L9999999999999999999L\n", b"S'ab'\n", b"Vab\n", b"K\x05", b"M\xff\xff", b"J\xff\xff\xff\x7f",
    b"G\x7f\xf0\0\0\0\0\0\0", b"U\x01a", b"X\x01\0\0\0a", b"\x8c\x01a", b"C\x01a", b"B\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\0\0\0\0", b"\x96\xff\xff\xff\xff\0\0\0\0", b"h\x00", b"q\x00",
    b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"g0\n", b"p0\n", b"\x8a\x01\x05", b"\x8b\xff\xff\xff\x7f", b"\x80\x05",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"\x82\x01",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.numeric\n_frombuffer\n", b"Pid\n",
    b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"cbuiltins\nbytearray\n", b"cbuiltins\nset\n", b"cposix\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ibuiltins\nset\n", b"\x84\xff\xff\xff\x7f", b"\x83\xff\xff",
]  # fmt: skip


def mutate_bytes(data: bytes, longest: int, random: random.Random, others: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """Bits and bytes of ``data`` flipped, overwritten, removed, doubled, or exchanged for those of another input or a token."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        size = len(content)
        place, action = random.randrange(size + 1), random.random()
        if action < 0.25 and size:
            content[place % size] ^= 1 << random.randrange(8)
        elif action < 0.4 and size:
            content[place % size] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif action < 0.5:
            del content[place : place + random.choice((1, 2, 4, 16, size))]
        elif action < 0.6:
            content[place:place] = content[random.randrange(size + 1) :][: random.choice((1, 2, 8, 64))]
        elif action < 0.7:
            width = random.choice((2, 4, 8))
            content[place : place + width] = random.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**63, 2**64 - 1, size)).to_bytes(9, "little")[
                :width
            ]
        elif action < 0.85 and tokens:
            token = random.choice(tokens)
            content[place : place + random.choice((0, len(token)))] = token
        else:
            other = random.choice(others)
            start = random.randrange(len(other) + 1)
            content[place : place + random.choice((0, 8, 64))] = other[start : start + random.choice((4, 16, 64, 256))]
    return bytes(content[:longest])
