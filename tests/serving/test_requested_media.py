"""What requests may name: the policy, over real sockets on this machine, and files that are refused undecoded."""

from __future__ import annotations

import base64
import datetime
import io
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_clip
from PIL import Image

from duetvl.core.errors import ConfigError, DataError
from duetvl.data.conversation import VideoPart
from duetvl.data.media.images import load_image
from duetvl.data.media.video import FrameRule, plan_frames, read_frames
from duetvl.data.media.video_index import read_index
from duetvl.serving.errors import ServerError
from duetvl.serving.fetching import addresses_of, is_public
from duetvl.serving.media import Kind, Media, MediaPolicy


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


PNG = encoded(Image.new("RGB", (32, 24), "red"))


def data_uri(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def refusal(media: Media, url: str, kind: Kind = "image") -> ServerError:
    with pytest.raises(ServerError) as caught:
        media.open(url, kind)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20).read_bytes()


# -- data: URIs ------------------------------------------------------------------------------------------------------


def test_a_data_uri_is_its_content() -> None:
    media, text = Media(MediaPolicy()), base64.b64encode(PNG).decode()
    assert media.open(data_uri(PNG), "image") == PNG
    assert media.open(f"DATA:image/png;charset=utf-8;base64,{text}", "image") == PNG
    assert media.open(f"data:application/octet-stream;base64,{text}", "image") == PNG
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert media.open(f"data:image/jpeg;base64, {lines}\r\n", "image") == PNG  # the content says what it is


def test_large_data_uris_are_decoded_in_pieces() -> None:
    noise = np.random.default_rng(3).integers(0, 255, (500, 400, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "BMP") + b"x"  # its base64 has padding
    text = base64.b64encode(content).decode()
    media = Media(MediaPolicy())
    lines = "\r\n".join(text[start : start + 77] for start in range(0, len(text), 77))
    for spelt in (text, lines, text.rstrip("="), f" {text}\n"):
        assert media.open(f"data:image/bmp;base64,{spelt}", "image") == content
    for bad in (text[:400_000] + "=" + text[400_000:], text[:300_001] + "?" + text[300_001:], text + "AAAA"):
        assert "not base64" in str(refusal(media, f"data:image/bmp;base64,{bad}"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:text/html;base64,PGI+", "its type is 'text/html', expected image/..."),
        ("data:video/mp4;base64,AAAA", "expected image/"),
        ("data:;base64,AAAA", "expected image/"),
        ("data:image/png,abc", "expected data:image/<type>;base64,<content>"),
        ("data:image/png;base64", "expected data:image/<type>;base64,<content>"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,a!b?", "not base64"),
        ("data:image/png;base64,päck", "not base64"),
        ("data:image/png;base64,AAAAA", "not base64"),
        ("", "reads no files"),
        ("/etc/passwd", "reads no files"),
        ("file:///etc/passwd", "reads no files"),
        ("../x.png", "reads no files"),
        ("ftp://example.org/x.png", "'ftp' is not a supported scheme"),
        ("javascript:1", "'javascript' is not a supported scheme"),
        ("https://example.org/x.png", "this server fetches no URLs"),
        ("https:///x.png", "not a URL"),
    ],
)
def test_what_names_nothing_here_is_refused(url: str, words: str) -> None:
    error = refusal(Media(MediaPolicy()), url)
    assert words in str(error) and error.status == 400 and error.param == "messages"


def test_bytes_are_bounded_before_base64_is_undone() -> None:
    media = Media(MediaPolicy(max_bytes=1000))
    for size in (1001, 10_000):
        error = refusal(media, data_uri(PNG + bytes(size)))
        assert (error.status, error.code) == (413, "media_too_large") and "1000 bytes" in str(error)


# -- files of the server ---------------------------------------------------------------------------------------------


def test_a_root_bounds_what_paths_reach(tmp_path: Path) -> None:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "way-out.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "sub" / "a b.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    media = Media(MediaPolicy(root=root))
    for good in (
        "sub/a b.png",
        str(root / "sub/a b.png"),
        f"file://{root}/sub/a%20b.png",
        "inside.png",
        "sub/../inside.png",
    ):
        assert media.open(good, "image") == PNG
    outside = str(tmp_path / "secret.png")
    bads = (
        "../secret.png",
        outside,
        f"file://{outside}",
        "way-out.png",
        "circle.png",
        "sub",
        "none.png",
        "a\0.png",
        "",
    )
    for bad in (*bads, "/dev/zero"):
        assert "there is no such file in the directory" in str(refusal(media, bad))
    assert "of no other machine" in str(refusal(media, f"file://elsewhere{root}/inside.png"))
    assert refusal(Media(MediaPolicy(root=root, max_bytes=10)), "inside.png").status == 413


# -- hosts -----------------------------------------------------------------------------------------------------------


class Remote(BaseHTTPRequestHandler):
    """A host that answers well or badly, by the path."""

    def do_GET(self) -> None:
        getattr(self, f"give_{self.path.partition('?')[0].strip('/')}")()

    def _head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def give_picture(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        self._head(Content_Length=str(len(PNG)), X_Host=self.headers["Host"])
        self.wfile.write(PNG)

    def give_open_ended(self) -> None:
        self._head()
        self.wfile.write(PNG)

    def give_moved(self) -> None:
        self._head(302, Location="http://169.254.169.254/latest/meta-data")

    def give_missing(self) -> None:
        self._head(404)

    def give_packed(self) -> None:
        self._head(Content_Encoding="gzip")

    def give_short(self) -> None:
        self._head(Content_Length=str(len(PNG) + 1))
        self.wfile.write(PNG)

    def give_promised(self) -> None:
        self._head(Content_Length=str(1 << 40))

    def give_endless(self) -> None:
        self._head()
        self._until_gone(bytes(1 << 16), 0)

    def give_drip(self) -> None:
        self._head()
        self._until_gone(b"x", 0.02)

    def give_dripping_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self._until_gone(b"X-A: b\r\n", 0.02)

    def _until_gone(self, piece: bytes, pause: float) -> None:
        try:
            for _ in range(1000):
                self.wfile.write(piece)
                time.sleep(pause)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def remote() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Remote) as server:
        server.daemon_threads = True
        server.hosts = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def loopback(_: str, __: int) -> Sequence[str]:
    return ["127.0.0.1"]


def fetching(port: int, **policy: object) -> Media:
    """Media of a server in whose network pictures.test is this machine."""
    options = {"hosts": (f"pictures.test:{port}", f"*.pictures.test:{port}"), "max_bytes": 100_000, "timeout": 5.0}
    return Media(MediaPolicy(**(options | policy)), resolve=loopback, may_connect=lambda address: True)  # type: ignore[arg-type]


def test_an_allowed_host_is_read_under_its_name(remote: ThreadingHTTPServer) -> None:
    port = remote.server_port
    media = fetching(port)
    for name in ("pictures.test", "PICTURES.test.", "a.b.pictures.test"):
        assert media.open(f"http://{name}:{port}/picture?a=b%20c", "image") == PNG
    assert media.open(f"http://pictures.test:{port}/open_ended", "image") == PNG
    assert remote.hosts[-3:] == [f"{name}:{port}" for name in ("pictures.test", "pictures.test", "a.b.pictures.test")]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("moved", "redirects are not followed", 400),
        ("missing", "answers with status 404", 400),
        ("packed", "compressed", 400),
        ("short", f"sent {len(PNG)} bytes of {len(PNG) + 1}", 400),
        ("promised", "larger than the 100000 bytes", 413),
        ("endless", "larger than the 100000 bytes", 413),
    ],
)
def test_a_host_that_answers_otherwise_is_refused(
    remote: ThreadingHTTPServer, path: str, words: str, status: int
) -> None:
    error = refusal(fetching(remote.server_port), f"http://pictures.test:{remote.server_port}/{path}")
    assert words in str(error) and error.status == status


@pytest.mark.parametrize("path", ["drip", "dripping_head"])
def test_the_whole_exchange_has_a_time_limit(remote: ThreadingHTTPServer, path: str) -> None:
    media = fetching(remote.server_port, timeout=0.2)
    assert "within 0.2 seconds" in str(refusal(media, f"http://pictures.test:{remote.server_port}/{path}"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://pictures.test:1/x", "does not fetch from pictures.test:1"),
        ("http://pictures.test/x", "does not fetch from pictures.test:80"),
        ("http://test:{port}/x", "does not fetch from test"),
        ("http://evilpictures.test:{port}/x", "does not fetch from evilpictures.test"),
        ("http://pictures.test.evil.test:{port}/x", "does not fetch from"),
        ("http://127.0.0.1:{port}/x", "does not fetch from"),
        ("http://user@pictures.test:{port}/x", "user name"),
        ("http://pictures.test:{port}@evil.test/x", "user name"),
        ("http://evil.test\\@pictures.test:{port}/x", "not a URL"),
        ("http://pictures.test:{port}/x y", "not a URL"),
        ("http://pictures.test:{port}/x\r\nHost: evil", "not a URL"),
        ("http://pictures.test:99999/x", "not a URL"),
        ("http://" + "a" * 70 + ".test/x", "not a URL"),
        ("http://[::1/x", "not a URL"),
    ],
)
def test_other_hosts_and_doubtful_urls_are_refused(remote: ThreadingHTTPServer, url: str, words: str) -> None:
    assert words in str(refusal(fetching(remote.server_port), url.format(port=remote.server_port)))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]",
     "169.254.169.254", "10.0.0.1", "192.168.1.1", "100.64.0.1", "[fe80::1]", "[fd00::1]",
     "\uff11\uff12\uff17.\uff10.\uff10.\uff11"],
)  # fmt: skip
def test_no_spelling_of_an_inner_address_is_connected_to(remote: ThreadingHTTPServer, host: str) -> None:
    media = Media(MediaPolicy(hosts=("*", f"*:{remote.server_port}"), timeout=1.0))
    before = len(remote.hosts)  # type: ignore[attr-defined]
    error = refusal(media, f"http://{host}:{remote.server_port}/picture")
    assert "does not lead to the open internet" in str(error) or "has no address" in str(error)
    assert len(remote.hosts) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "address",
    ["::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:102:304::80ff:fffe", "fec0::1", "ff02::1",
     "224.0.1.1", "255.255.255.255", "0.0.0.0", "::", "fe80::1%eth0", "198.18.0.1", "203.0.113.5"],
)  # fmt: skip
def test_an_address_inside_another_is_seen(address: str) -> None:
    assert not is_public(address)


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")))
    assert addresses_of("127.0.0.1", 80) == ["127.0.0.1"]


def test_a_name_is_resolved_once_and_all_of_its_addresses_count(remote: ThreadingHTTPServer) -> None:
    asked, answers = [], [["127.0.0.1"], ["10.0.0.1"]]

    def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    policy = MediaPolicy(hosts=(f"*:{remote.server_port}",))
    media = Media(policy, resolve=rebinding, may_connect=lambda address: address == "127.0.0.1")
    assert media.open(f"http://rebinding.test:{remote.server_port}/picture", "image") == PNG
    assert asked == ["rebinding.test"]
    media = Media(policy, resolve=lambda *_: ["127.0.0.1", "10.0.0.1"], may_connect=lambda a: a == "127.0.0.1")
    assert "open internet" in str(refusal(media, f"http://both.test:{remote.server_port}/picture"))


def test_tls_checks_the_name_at_the_address(tmp_path: Path) -> None:
    names: list[str | None] = []
    authority = certificate_for("pictures.test", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    context.sni_callback = lambda sock, name, _: names.append(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Remote) as server:
        server.hosts = []  # type: ignore[attr-defined]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        policy = MediaPolicy(hosts=(f"*:{server.server_port}",), timeout=5.0)
        trusting = ssl.create_default_context(cafile=str(authority))
        media = Media(policy, resolve=loopback, may_connect=lambda address: True, tls=trusting)
        assert media.open(f"https://pictures.test:{server.server_port}/picture", "image") == PNG
        assert "cannot be read from" in str(refusal(media, f"https://other.test:{server.server_port}/picture"))
        assert names == ["pictures.test", "other.test"]
        untrusting = Media(policy, resolve=loopback, may_connect=lambda address: True)
        assert "cannot be read from" in str(refusal(untrusting, f"https://pictures.test:{server.server_port}/picture"))
        server.shutdown()


def certificate_for(name: str, directory: Path) -> Path:
    """A key and the certificate that it signs for itself, in one PEM file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.add_extension(names, False).add_extension(x509.BasicConstraints(True, None), True)
    signed = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = directory / "both.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form) + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


# -- pictures --------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG file whose header states a size, and that has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing; convert it"),
        (b"<?xml version='1.0'?><svg/>", "SVG drawing"),
        (HEIC, "a HEIC or HEIF picture; convert it to JPEG or PNG"),
        (bytes(5000), "nothing but zero bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"P6 9 9 255\n" + bytes(243), "one of JPEG, PNG"),
        (b"hello", "is text"),
        (PNG[:20], "damaged"),
        (png_of(40_000, 40_000), "too large"),
        (png_of(10_000, 10_000), "10000 x 10000 pixels, at most 64000000"),
        (png_of(0, 10), "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_picture_or_too_large_is_refused_undecoded(content: bytes, words: str) -> None:
    error = refusal(Media(MediaPolicy()), data_uri(content))
    assert words in str(error) and error.status == 400 and str(error).startswith("data URI data:image/png;base64,")


def test_a_video_is_no_picture_and_a_picture_no_video(clip: bytes) -> None:
    media = Media(MediaPolicy())
    assert "an MP4 or QuickTime video; give it as a video" in str(refusal(media, data_uri(clip)))
    assert "is a picture: give it as image_url" in str(refusal(media, data_uri(PNG, "video/mp4"), "video"))


def test_moving_pictures_are_their_first_frame_and_truncated_ones_are_refused() -> None:
    frames = [Image.new("RGB", (8, 8), (number % 256, 0, 0)) for number in range(300)]
    for form in ("GIF", "WEBP"):
        moving = encoded(
            frames[200],
            form,
            save_all=True,
            append_images=frames[:100],
            **({"lossless": True} if form == "WEBP" else {}),
        )
        content = Media(MediaPolicy()).open(data_uri(moving), "image")
        assert load_image(content).getpixel((0, 0)) == (200, 0, 0)
    noise = Image.effect_noise((200, 200), 90)
    for form in ("JPEG", "PNG"):
        content = Media(MediaPolicy()).open(data_uri(encoded(noise, form)[:-3000]), "image")
        with pytest.raises(DataError, match=r"truncated|damaged"):
            load_image(content)


# -- videos ----------------------------------------------------------------------------------------------------------


def test_videos_are_bounded_by_length_frames_pixels_and_bytes(clip: bytes, tmp_path: Path) -> None:
    url = data_uri(clip, "video/mp4")
    assert Media(MediaPolicy()).open(url, "video") == clip
    for policy, words in (
        (MediaPolicy(max_video_seconds=1.9), "2 seconds long, at most 1.9"),
        (MediaPolicy(max_frames=19), "has 20 frames, at most 19"),
        (MediaPolicy(max_pixels=48 * 64 - 1), "64 x 48 pixels"),
        (MediaPolicy(decode_seconds=1e-9), "takes more than 1e-09 seconds"),
    ):
        error = refusal(Media(policy), url, "video")
        assert words in str(error) and error.status == 400
    assert refusal(Media(MediaPolicy(max_bytes=100)), url, "video").status == 413
    long = write_clip(tmp_path / "long.mkv", 3, times=[0, 1000, 36_000_000]).read_bytes()
    assert "36000 seconds long" in str(refusal(Media(MediaPolicy()), data_uri(long, "video/x-matroska"), "video"))


def test_other_containers_are_read(tmp_path: Path) -> None:
    for name, codec in (
        ("a.mkv", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.ts", "mpeg2video"),
        ("a.mov", "mpeg4"),
        ("a.flv", "flv"),
    ):
        content = write_clip(tmp_path / name, 10, rate=25, codec=codec).read_bytes()
        assert Media(MediaPolicy()).open(data_uri(content, "video/any"), "video") == content, name


def test_videos_without_frames_or_of_no_video_are_refused(clip: bytes, tmp_path: Path) -> None:
    for content, words in (
        (clip[: clip.index(b"mdat") + 4], "damaged or not a video"),
        (clip[:300], "damaged or not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "text"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "text"),
        (bytes(400), "zero bytes"),
    ):
        assert words in str(refusal(Media(MediaPolicy()), data_uri(content, "video/mp4"), "video")), content[:20]


def test_a_video_in_memory_leads_to_no_files(clip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip)
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile clip.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:  # FFmpeg itself follows it
        assert container.streams.video
    with pytest.raises(DataError, match="damaged or not a video"):
        read_index(playlist)


def test_decoding_has_a_time_limit(clip: bytes) -> None:
    plan = plan_frames(read_index(clip, 60.0), FrameRule(), VideoPart(clip))
    assert len(list(read_frames(clip, plan, 60.0))) == len(plan.picks)
    with pytest.raises(DataError, match="takes more than 1e-09 seconds to decode"):
        list(read_frames(clip, plan, 1e-9))


# -- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: MediaPolicy(max_bytes=0), lambda: MediaPolicy(timeout=float("nan")), lambda: MediaPolicy(max_media=-1),
     lambda: MediaPolicy(max_pixels=1 << 40), lambda: MediaPolicy(root=Path("/nowhere")),
     lambda: Media(MediaPolicy(hosts=("https://example.org",))), lambda: Media(MediaPolicy(hosts=("",)))],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_pictures_and_videos_are_counted() -> None:
    media = Media(MediaPolicy(max_media=2))
    media.check_count(2)
    with pytest.raises(ServerError, match="has 3 pictures and videos, this server takes 2"):
        media.check_count(3)
