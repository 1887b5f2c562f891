"""What picture files hold beside the pixels: of it only which way is up matters, and none of it can cost the pixels."""
from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ORIENTATION = 0x112  # the number of the tag
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
TIFF_TAGS = {  # sizes, compression, colours, strips and tiles
    *range(254, 260), 262, 266, 273, ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332, 338,
    339, 347, *range(529, 533)}
LOCK, READERS, FILTERS = threading.Lock(), [], ExitStack()  # of `without_warnings`, whose readers are threads


@contextmanager
def without_warnings() -> Iterator[None]:
    """Within it no warnings are shown: Pillow's are of metadata, and name lines of its own instead of the picture.

    Python's filters belong to all threads, so the first that comes changes them, and the last that goes restores them.
    """
    with LOCK:
        if not READERS:
            FILTERS.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        READERS.append(None)
    try:
        yield
    finally:
        with LOCK:
            READERS.pop()
            if not READERS:
                FILTERS.close()


def orientation(exif: bytes) -> int:
    """Which way is up, 1 to 8 as EXIF numbers it, or 0 if the data do not say; all their other entries may be wrong."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        start, = struct.unpack_from(f"{order}I", exif, 4)
        count, = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == ORIENTATION:
                turn, = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, at + 8)
                return turn if 1 <= turn <= 8 else 0
    except (KeyError, struct.error):
        pass
    return 0


def without_metadata(path: str | Path) -> bytes:
    """A PNG, JPEG or TIFF file with what its pixels need, and the orientation. Of other formats no bytes."""
    with open(path, "rb") as file:
        start = file.read(4)
        for signature, bare in ((b"\x89PNG", bare_png), (b"\xff\xd8", bare_jpeg), (b"II*\0", bare_tiff),
                                (b"MM\0*", bare_tiff), (b"II+\0", bare_tiff), (b"MM\0+", bare_tiff)):
            if start.startswith(signature):
                return bare(start + file.read())
    return b""


def bare_png(file: bytes) -> bytes:
    kept, at = [file[:8]], 8
    while at < len(file):
        end = at + 12 + int.from_bytes(file[at:at + 4], "big")  # a length, a name, the content, a checksum
        if file[at + 4:at + 8] in PNG_CHUNKS:
            kept.append(file[at:end])
        at = end
    return b"".join(kept)


def bare_jpeg(file: bytes) -> bytes:
    kept, at = [file[:2]], 2
    while file[at:at + 1] == b"\xff" and file[at + 1:at + 2] != b"\xda":  # where the pixels begin
        name, end = file[at + 1], at + 2 + int.from_bytes(file[at + 2:at + 4], "big")
        if name == 0xff:  # may be repeated
            end = at + 1
        elif name == 0xe1 and (turn := orientation(file[at + 4:end])):
            exif = b"Exif\0\0MM" + struct.pack(">HIHHHIHHI", 42, 8, 1, ORIENTATION, 3, 1, turn, 0, 0)
            kept.append(b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif)
        # APP0 and APP14 tell which colours these are, if they are whole; the other APPs and COM are metadata.
        elif not (0xe0 <= name <= 0xef or name == 0xfe) or (name == 0xe0 and end - at >= 18) or (
                name == 0xee and end - at >= 16):
            kept.append(file[at:end])
        at = end
    return b"".join([*kept, file[at:]])


def bare_tiff(file: bytes) -> bytes:
    order = "<" if file.startswith(b"II") else ">"
    # Where the directory's place is told, and how; how its entries are counted, and how long they are.
    at, place, number, size = (8, "Q", "Q", 20) if 43 in file[2:4] else (4, "I", "H", 12)
    start, = struct.unpack_from(order + place, file, at)
    count, = struct.unpack_from(order + number, file, start)
    first = start + struct.calcsize(number)
    entries = [file[at:at + size] for at in range(first, first + size * count, size)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(order + number, len(kept)) + b"".join(kept)
    end = first + size * count + struct.calcsize(place)  # zeros say that no other directory follows
    return file[:start] + directory.ljust(end - start, b"\0") + file[end:]  # what is pointed to stays where it was
