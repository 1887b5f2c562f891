"""Whatever stands beside the pixels: a picture is read, turned as far as that can be known, and nobody is bothered."""
from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from datasets import read_image
from safety.metadata import without_metadata, without_warnings

REPOSITORY = Path(__file__).parent.parent
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60))
FAR = struct.pack("<I", 99_999)
TURN = (0x112, 3, 1, struct.pack("<HH", 6, 0))


def directory(entries: list[tuple[int, int, int, bytes]], start: int = 8) -> bytes:
    """Of a TIFF file: tag, type, count, and four bytes that are the value or say where it is."""
    return struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)


def exif(*entries: tuple[int, int, int, bytes], after: bytes = b"") -> bytes:
    return b"II*\0\x08\0\0\0" + directory(list(entries)) + after


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    PHOTO.save(file, kind, **options)
    return file.getvalue()


def jpeg(*segments: tuple[int, bytes], keep_jfif: bool = False) -> bytes:
    file = saved("JPEG", quality=95)
    return file[:2] + b"".join(struct.pack(">BBH", 255, marker, len(content) + 2) + content
                               for marker, content in segments) + file[2 if keep_jfif else 20:]


def png(*chunks: tuple[bytes, bytes], last: bool = False) -> bytes:
    file = saved("PNG")
    at = len(file) - 12 if last else 33
    return file[:at] + b"".join(struct.pack(">I", len(content)) + name + content
                                + struct.pack(">I", zlib.crc32(name + content)) for name, content in chunks) + file[at:]


def tiff(*entries: tuple[int, int, int, bytes], **options: str) -> bytes:
    """A TIFF file with these entries beside its own."""
    file = saved("TIFF", **options)
    start, = struct.unpack_from("<I", file, 4)
    count, = struct.unpack_from("<H", file, start)
    own = [struct.unpack_from("<HHI4s", file, start + 2 + 12 * i) for i in range(count)]
    new = {entry[0] for entry in entries}
    merged = sorted([*entries, *(entry for entry in own if entry[0] not in new)])
    at = len(file) + len(file) % 2
    return file[:4] + struct.pack("<I", at) + file[8:].ljust(at - 8, b"\0") + directory(merged)


def big_tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A BigTIFF file with these entries beside those that its pixels need."""
    own = [(256, 3, 1, PHOTO.width), (257, 3, 1, PHOTO.height), (258, 3, 3, 0x8_0008_0008), (259, 3, 1, 1),
           (262, 3, 1, 2), (273, 4, 1, 16), (277, 3, 1, 3), (278, 3, 1, PHOTO.height), (279, 4, 1, 3 * 80 * 60)]
    packed = [struct.pack("<HHQ8s", *each) for each in entries] + [struct.pack("<HHQQ", *each) for each in own]
    pixels = PHOTO.tobytes()
    return (b"II+\0\x08\0\0\0" + struct.pack("<Q", 16 + len(pixels)) + pixels + struct.pack("<Q", len(packed))
            + b"".join(sorted(packed, key=lambda each: struct.unpack_from("<H", each))) + bytes(8))


EXIF = {  # what is expected, r for turned right and u for upright, and the data
    "in order": ("r", exif(TURN)),
    "big end first": ("r", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "EXIF nowhere": ("r", exif(TURN, (0x8769, 4, 1, FAR))),
    "EXIF in letters": ("r", exif(TURN, (0x8769, 2, 4, b"abc\0"))),
    "EXIF leads back": ("r", exif(TURN, (0x8769, 4, 1, struct.pack("<I", 8)))),
    "GPS nowhere": ("r", exif(TURN, (0x8825, 4, 1, FAR))),
    "GPS in letters": ("r", exif(TURN, (0x8825, 2, 4, b"abc\0"))),
    "another picture nowhere": ("r", exif(TURN, (0x14a, 2, 4, b"abc\0"))),
    "a resolution of 0 / 0": ("r", exif(TURN, (0x11a, 5, 1, struct.pack("<I", 38)), after=bytes(8))),
    "a resolution in letters": ("r", exif(TURN, (0x11a, 2, 4, b"abc\0"), (0x128, 3, 1, b"\2\0\0\0"))),
    "a resolution of no letters": ("r", exif(TURN, (0x11a, 2, 1, bytes(4)), (0x128, 3, 1, b"\2\0\0\0"))),
    "a unit in letters": ("r", exif(TURN, (0x128, 2, 4, b"abc\0"))),
    "a maker before it, nowhere": ("r", exif((0x10f, 2, 100, FAR), TURN)),
    "a maker of gigabytes": ("r", exif((0x10f, 2, 0xffffffff, FAR), TURN)),
    "a maker that is no text": ("r", exif((0x10f, 2, 4, b"\xff\xfe\x80\0"), TURN)),
    "a type that does not exist": ("r", exif((0x10f, 99, 1, FAR), TURN)),
    "a header twice": ("r", b"Exif\0\0" + exif(TURN)),
    "more entries than there are": ("r", exif(TURN).replace(b"\1\0\x12", b"\xff\0\x12")),
    "the orientation as a byte": ("r", exif((0x112, 1, 1, b"\6\0\0\0"))),
    "the orientation in letters": ("u", exif((0x112, 2, 4, b"top\0"))),
    "the orientation a fraction, nowhere": ("u", exif((0x112, 5, 1, FAR))),
    "an orientation of 0": ("u", exif((0x112, 3, 1, bytes(4)))),
    "an orientation of 99": ("u", exif((0x112, 3, 1, b"\x63\0\0\0"))),
    "nothing": ("u", b""), "a letter": ("u", b"I"), "a header": ("u", b"II*\0"), "cut": ("u", exif(TURN)[:12]),
    "no header": ("u", b"\0\x08\0\x02\x01\x12\0\x03" + bytes(20)),
    "in BigTIFF": ("u", b"II+\0\x08\0\0\0\x10" + bytes(40)),
    "entries nowhere": ("u", b"II*\0" + FAR), "noise": ("u", np.random.default_rng(1).bytes(300)),
}
LONG = zlib.compress(b"x" * 2_000_000)
BOMB = zlib.compress(bytes(300_000_000))
UPRIGHT = {
    "PNG, long text": png((b"zTXt", b"Comment\0\0" + LONG)),
    "PNG, long text, plain": png((b"tEXt", b"Comment\0" + b"x" * 2_000_000)),
    "PNG, long text at the end": png((b"zTXt", b"Comment\0\0" + LONG), last=True),
    "PNG, long text of any language": png((b"iTXt", b"Comment\0\1\0\0\0" + LONG)),
    "PNG, long XMP": png((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)),
    "PNG, a long profile": png((b"iCCP", b"icc\0\0" + LONG)), "PNG, no profile": png((b"iCCP", b"icc")),
    "PNG, text in an unknown compression": png((b"zTXt", b"Comment\0\7x")),
    "PNG, text called exif": png((b"zTXt", b"exif\0\0" + zlib.compress(b"Exif"))),
    "PNG, a resolution cut off": png((b"pHYs", b"\0")), "PNG, colours cut off": png((b"cHRM", b"\0")),
    "PNG, gamma cut off": png((b"gAMA", b"\0")), "PNG, frames cut off": png((b"acTL", b"\0")),
    "PNG, no frames": png((b"acTL", bytes(8))), "PNG, a frame beyond": png((b"fcTL", b"\1" * 26)),
    "PNG, a wrong checksum": png((b"tEXt", b"C\0x")).replace(b"C\0x", b"C\0y"),
    "JPEG, no JFIF": jpeg((0xe0, b"JFIF\0")), "JPEG, a profile cut off": jpeg((0xe2, b"ICC_PROFILE\0"), keep_jfif=True),
    "JPEG, Photoshop cut off": jpeg((0xed, b"Photoshop 3.0\0008BIM\3\xed"), keep_jfif=True),
    "JPEG, Adobe cut off": jpeg((0xee, b"Adobe"), keep_jfif=True),
    "JPEG, several pictures nowhere": jpeg((0xe2, b"MPF\0" + exif((0xb001, 4, 1, b"\2\0\0\0"), (0xb002, 7, 32, FAR)))),
    "TIFF, a description nowhere": tiff((0x10e, 2, 400, FAR)), "TIFF, a maker nowhere": tiff((0x10f, 2, 400, FAR)),
    "TIFF, XMP in letters": tiff((700, 2, 4, b"abc\0")), "TIFF, XMP of a number": tiff((700, 3, 1, bytes(4))),
    "BigTIFF": big_tiff(), "BigTIFF, a description nowhere": big_tiff((0x10e, 2, 400, struct.pack("<Q", 99_999))),
    "TIFF, EXIF nowhere": tiff((0x8769, 4, 1, FAR)), "TIFF, a profile nowhere": tiff((34675, 7, 400, FAR)),
}
TURNED = {
    "PNG, long text": png((b"zTXt", b"Comment\0\0" + LONG), (b"eXIf", exif(TURN))),
    "PNG, XMP": png((b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')),
    "PNG, ImageMagick's text": png((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n  32\n" + (b"Exif\0\0" + exif(TURN)).hex().encode()))),
    "JPEG, a profile cut off": jpeg((0xe1, b"Exif\0\0" + exif(TURN)), (0xe2, b"ICC_PROFILE\0"), keep_jfif=True),
    "JPEG, EXIF in two parts": jpeg((0xe1, b"Exif\0\0" + exif(TURN)[:15]), (0xe1, b"Exif\0\0" + exif(TURN)[15:])),
    "TIFF": tiff(TURN), "TIFF, a maker nowhere": tiff((0x10f, 2, 400, FAR), TURN),
    "BigTIFF, a maker nowhere": big_tiff((0x10f, 2, 400, struct.pack("<Q", 99_999)), (0x112, 3, 1, b"\6")),
    "TIFF, compressed, a maker nowhere": tiff((0x10f, 2, 400, FAR), TURN, compression="tiff_lzw"),
}
CONTAINERS = {"JPEG": lambda data: jpeg((0xe1, b"Exif\0\0" + data)), "PNG": lambda data: png((b"eXIf", data)),
              "WebP": lambda data: saved("WEBP", lossless=True, exif=b"Exif\0\0" + data)}
CASES = {f"{container}, {name}": (expected, make(data)) for container, make in CONTAINERS.items()
         for name, (expected, data) in EXIF.items()}
CASES |= {name: ("u", file) for name, file in UPRIGHT.items()}
CASES |= {f"{name}, turned": ("r", file) for name, file in TURNED.items()}


@pytest.mark.parametrize(("expected", "file"), CASES.values(), ids=CASES)
def test_metadata_never_cost_the_pixels(expected: str, file: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        pixels = read_image(tmp_path / "x").astype(int)
    assert shown == []
    ways = {"u": PHOTO, "r": PHOTO.transpose(Image.Transpose.ROTATE_270)}
    off = {way: np.abs(pixels - read_image(picture)).mean() for way, picture in ways.items()}
    assert min(off, key=off.get) == expected and off[expected] < 6


@pytest.mark.parametrize("by_name", [False, True])
def test_long_text_behind_the_pixels_of_a_picture_that_was_opened(by_name: bool, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png((b"zTXt", b"Comment\0\0" + LONG), last=True))
    with Image.open(tmp_path / "x.png" if by_name else io.BytesIO((tmp_path / "x.png").read_bytes())) as picture:
        assert np.array_equal(read_image(picture), read_image(PHOTO))


COLOURS = {  # three numbers a pixel are RGB or YCbCr, as JFIF's header says, then Adobe's, then the channels' names
    "by JFIF": saved("JPEG", comment=b"x" * 99),
    "by JFIF, though Adobe's is there": jpeg((0xee, b"Adobe\0\x64\0\0\0\0\0"), (0xfe, b"x" * 99), keep_jfif=True),
    "by Adobe": saved("JPEG", keep_rgb=True, comment=b"x" * 99).replace(
        b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0").replace(b"R\0G\0B\0", b"\1\0\2\0\3\0"),
    "by name": jpeg((0xfe, b"x" * 99))}


@pytest.mark.parametrize("file", COLOURS.values(), ids=COLOURS)
def test_a_bare_jpeg_has_its_colours(file: bytes, tmp_path: Path) -> None:
    """Which they are is said in the headers, beside what is cut away."""
    (tmp_path / "x.jpg").write_bytes(file)
    bare = without_metadata(tmp_path / "x.jpg")
    assert len(bare) <= len(file) - 99
    with Image.open(io.BytesIO(bare)) as picture, Image.open(tmp_path / "x.jpg") as whole:
        assert np.array_equal(np.asarray(picture), np.asarray(whole))
        assert np.abs(np.asarray(whole).astype(int) - np.asarray(PHOTO)).mean() < 9, "the test is real"


@pytest.mark.parametrize("file", [png((b"zTXt", b"C\0\0" + LONG)), jpeg((0xee, b"Adobe"))], ids=["PNG", "JPEG"])
def test_without_metadata_half_a_picture_is_still_none(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file[:-len(file) // 2])
    with refused(str(tmp_path / "x"), "cannot be read"):
        read_image(tmp_path / "x")


def test_a_bomb_of_text_takes_no_memory(tmp_path: Path) -> None:
    """Three texts and a profile of 300 MB each, in a file of 1 MB, by a process that may not take so much."""
    bombs = [(b"zTXt", b"C\0\0" + BOMB), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), (b"iCCP", b"icc\0\0" + BOMB),
             (b"zTXt", b"Raw profile type exif\0\0" + BOMB)]
    for i, last in enumerate((False, True)):
        (tmp_path / f"{i}.png").write_bytes(png(*bombs, last=last))
    code = """import resource, sys
from datasets import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    read_image(path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "0.png", tmp_path / "1.png"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60  # MB
    assert done.stderr == ""


def test_a_file_without_end_is_not_read_for_its_metadata() -> None:
    assert without_metadata("/dev/zero") == b""
    with refused("/dev/zero", "cannot be read"):
        read_image("/dev/zero")


def test_threads_do_not_leave_warnings_silenced() -> None:
    """The second begins before the first ends, and ends after it."""
    filters = list(warnings.filters)
    first_ended, second_began = threading.Event(), threading.Event()

    def second() -> None:
        with without_warnings():
            second_began.set()
            first_ended.wait(10)
            warnings.warn("seen", stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        thread = threading.Thread(target=second)
        with without_warnings():
            thread.start()
            second_began.wait(10)
        first_ended.set()
        thread.join()
        assert shown == []
        warnings.warn("heard", stacklevel=1)
    assert [str(each.message) for each in shown] == ["heard"]
    assert warnings.filters == filters


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_tiff_whose_lowest_number_is_white(tmp_path, dtype):
    """As X-rays have it: Pillow knows it of 8 bits alone."""
    ramp = np.linspace(0, np.iinfo(dtype).max, 64 * 64).reshape(64, 64).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / "plain.tif")
    Image.fromarray(np.iinfo(dtype).max - ramp).save(tmp_path / "inverted.tif")
    file = (tmp_path / "inverted.tif").read_bytes()
    tag = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert file.count(tag) == 1
    (tmp_path / "inverted.tif").write_bytes(file.replace(tag, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    one, other = (read_image(tmp_path / f"{name}.tif").astype(int) for name in ("plain", "inverted"))
    assert abs(one - other).max() <= 1
