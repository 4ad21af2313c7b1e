"""What a file is that cannot be read as a picture or video, in words, by its first bytes."""

from __future__ import annotations

from typing import Final

LONGEST_HEAD: Final = 512  # bytes that are looked at

LFS_POINTER: Final = b"version https://git-lfs"

_CONVERT: Final = "convert it to JPEG or PNG"
_UNPACK: Final = "unpack it first"
_FILM: Final = "give it as a video"
_SOUND: Final = "sound is not read"
_DAMAGED: Final = "its header is damaged"

# What is at which place of the file, what it is, and what to do.
_MAGIC: Final = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", _DAMAGED),
    (0, b"\xff\xd8\xff", "a JPEG picture", _DAMAGED),
    (0, b"GIF8", "a GIF picture", _DAMAGED),
    (8, b"WEBP", "a WebP picture", _DAMAGED),
    (0, b"II*\0", "a TIFF or a camera's raw picture", f"damaged, or of a kind that Pillow does not read; {_CONVERT}"),
    (0, b"MM\0*", "a TIFF or a camera's raw picture", f"damaged, or of a kind that Pillow does not read; {_CONVERT}"),
    (0, b"BM", "a BMP picture", _DAMAGED),
    (4, b"ftypcrx", "a camera's raw picture", _CONVERT),
    *((4, b"ftyp" + brand, "an AVIF picture", _CONVERT) for brand in (b"avif", b"avis")),
    *(
        (4, b"ftyp" + brand, "a HEIC or HEIF picture", _CONVERT)
        for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    ),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL picture", _CONVERT),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (4, b"ftyp", "an MP4 or QuickTime video", _FILM),
    (8, b"AVI ", "an AVI video", _FILM),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video", _FILM),
    (0, b"FLV\1", "an FLV video", _FILM),
    (8, b"WAVE", "a WAV sound file", _SOUND),
    (0, b"ID3", "an MP3 sound file", _SOUND),
    (0, b"OggS", "an Ogg file", _SOUND),
    (0, b"fLaC", "a FLAC sound file", _SOUND),
    (0, b"%PDF", "a PDF document", "convert its pages to pictures"),
    (0, b"%!PS", "a PostScript document", _CONVERT),
    (0, b"PK\3\4", "a ZIP archive or an office document", _UNPACK),
    (0, b"\x1f\x8b", "gzip data", _UNPACK),
    (0, b"BZh", "bzip2 data", _UNPACK),
    (0, b"\xfd7zXZ", "xz data", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x93NUMPY", "a NumPy array", "load it and give the array"),
    (0, b"\x89HDF", "an HDF5 file", _UNPACK),
    (0, LFS_POINTER, "a Git LFS pointer and not the file itself", "run `git lfs pull`"),
)
_TEXTS: Final = (
    ((b"<!doctype html", b"<html", b"<head", b"<body"), "a web page (HTML)", "download the file itself"),
    ((b"<svg",), "an SVG drawing", _CONVERT),
    ((b"<?xml",), "XML (an SVG drawing, or a server's error)", "convert it, or download it once more"),
    ((b"{", b"["), "JSON (a server's error?)", "download the file itself"),
    ((b"data:", b"ivborw0kggo", b"/9j/"), "a picture as base64 text", "decode it, or put the text into the record"),
)


def what_it_is(head: bytes, *, but_video: bool = False) -> str:
    """What a file with these first bytes is, and what to do: "a HEIC picture; ..."; "" where that is not known.

    So it is of a video where that is not the answer (`but_video`).
    """
    for place, magic, what, advice in _MAGIC:
        if head.startswith(magic, place):
            return "" if but_video and advice == _FILM else f"{what}; {advice}"
    if head and not head.strip(b"\0"):
        return "nothing but zero bytes; download it once more"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginnings, what, advice in _TEXTS:
        if text.startswith(beginnings):
            return f"{what}; {advice}"
    return "text" if text and is_text(text) else ""


def is_text(head: bytes) -> bool:
    """Whether there is no byte in it that no text has."""
    return not any(byte < 9 or 13 < byte < 32 for byte in head)
