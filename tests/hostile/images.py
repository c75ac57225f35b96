"""Image folders, one folder a class, and Tiny-ImageNet."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

from lirpa_ext.data import load_data as read  # noqa: F401


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=None, depth=8, more=b""):
    """A gray PNG that claims a size; without data of that size, in black."""
    if data is None:
        pack, row = zlib.compressobj(1), bytes(1 + width)
        data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def image(content, name="a.png", count=1):
    """Maker of a folder of one class."""

    def make(folder):
        (folder / "class").mkdir()
        for index in range(count):
            (folder / "class" / f"{index}{name}").write_bytes(content() if callable(content) else content)
        return str(folder)

    return make


def outside(link):
    """Maker of a data set beside a secret image, with a link to it, or to its folder."""

    def make(folder):
        (folder / "outside").mkdir()
        (folder / "outside" / "secret.png").write_bytes(png(3, 3))
        place = folder / "data" / link
        place.parent.mkdir(parents=True)
        os.symlink(folder / "outside" / ("secret.png" if place.suffix else ""), place)
        return str(folder / "data")

    return make


def pipe(folder):
    (folder / "class").mkdir()
    os.mkfifo(folder / "class" / "a.png")
    return str(folder)


def loop(folder):
    (folder / "class").mkdir()
    os.symlink(folder / "class" / "a.png", folder / "class" / "a.png")
    return str(folder)


def tiny(annotations, classes=b"n1\nn2"):
    """Maker of a Tiny-ImageNet with two images, a.JPEG and a higher b.JPEG."""

    def make(folder):
        data = folder / "data"
        (data / "val" / "images").mkdir(parents=True)
        (data / "wnids.txt").write_bytes(classes)
        (data / "val" / "val_annotations.txt").write_text(annotations.format(folder=folder))
        for place, height in ((folder / "secret.JPEG", 4), *((data / "val/images" / f"{n}.JPEG", 4 + 2 * (n == "b"))
                                                            for n in "ab")):  # fmt: skip
            Image.fromarray(np.zeros((height, 4), np.uint8)).save(place)
        return str(data)

    return make


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%mkdir executed) (w) file\n"
BMP = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, *[0] * 6)
NO_IMAGE, NO_TINY = "no image that can be read", "no complete Tiny-ImageNet"
CASES = {
    "fine": (image(png(4, 4)), None),
    "claims-60000-pixels-a-side": (image(png(60000, 60000, zlib.compress(bytes(1000)))), NO_IMAGE),
    "bomb": (image(lambda: png(12000, 12000)), "it is 12000x12000, over"),
    "many-bombs": (image(png(4000, 4000), count=12), "far more than it has on the disk"),
    "no-pixels": (image(png(0, 0, b"")), NO_IMAGE),
    "cut": (image(saved("png")[:60]), NO_IMAGE),
    "jpeg-cut": (image(saved("jpeg")[:900], "a.jpg"), NO_IMAGE),
    "odd-depth": (image(png(2, 2, zlib.compress(bytes(6)), 77)), NO_IMAGE),
    "text-bomb": (image(png(2, 2, more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))))), NO_IMAGE),
    "profile-bomb": (image(png(2, 2, more=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**26))))), NO_IMAGE),
    "postscript": (image(EPS), NO_IMAGE),
    "nothing": (image(b""), NO_IMAGE),
    "gif": (image(b"GIF89a" + b"\xff" * 50, "a.gif"), NO_IMAGE),
    "tiff-of-nonsense": (image(b"II*\0\x08\0\0\0" + b"\xff" * 5000, "a.tif"), NO_IMAGE),
    "tiff-in-a-circle": (image(b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8), "a.tif"), NO_IMAGE),
    "bmp-of-exabytes": (image(BMP, "a.bmp"), NO_IMAGE),
    "ppm-of-digits": (image(b"P3\n2 2\n255\n" + b"9" * 10**6, "a.ppm"), NO_IMAGE),
    "webp": (image(b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(100), "a.webp"), NO_IMAGE),
    "a-link-outside": (outside("class/a.png"), "leads out of"),
    "a-class-outside": (outside("class"), "leads out of"),
    "a-link-to-itself": (loop, NO_IMAGE),
    "a-pipe": (pipe, "missing, or no file"),
    "tiny-fine": (tiny("a.JPEG\tn1\n"), None),
    "tiny-names-a-file-outside": (tiny("../../../secret.JPEG\tn1\n"), "leads out of"),
    "tiny-names-a-path": (tiny("{folder}/secret.JPEG\tn1\n"), "leads out of"),
    "tiny-of-two-sizes": (tiny("a.JPEG\tn1\nb.JPEG\tn2\n"), "bring all images to one size"),
    "tiny-unknown-class": (tiny("a.JPEG\tn9\n"), NO_TINY),
    "tiny-without-labels": (tiny("a.JPEG\n"), NO_TINY),
    "tiny-nul": (tiny("a\0.JPEG\tn1\n"), NO_IMAGE),
    "tiny-no-text": (tiny("a.JPEG\tn1\n", b"\xff\xfe\0"), NO_TINY),
    "tiny-long-name": (tiny("a" * 5000 + "\tn1\n"), f"{NO_IMAGE}|missing"),
}
