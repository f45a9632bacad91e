"""`snella data check`, and downloads that resume, check and unpack safely."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import formats
import pytest

from snella.cli import main
from snella.data.archives import unpack
from snella.data.check import check, lines
from snella.data.download import Download, File, download, fetch, load_downloads
from snella.errors import UserError
from snella.files import try_lock
from snella.suite.config import load

LABELS = {"train800": [0, 1, 2, 0, 1, 2], "val200": [0, 1, 2], "test": [0, 1, 2, 0]}
from conftest import ROOT  # noqa: E402


def entry(path, num_classes=None, **options):
    return SimpleNamespace(path=str(path), num_classes=num_classes, options=options)


def test_a_good_copy(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    found = lines(check("birds", entry(root)))
    assert found[0] == f"✓ vtab layout in {root}: 6 train, 3 val, 4 test images"
    assert "✓ test: 3 of 3 classes, 1 to 2 images each" in found
    assert (
        "✓ pixels: 13 JPEG, JPEG quality 75, 4:2:0 in 100%; 20x24; variant community-jpeg" in found
    )
    assert found[-1] == "good"


def test_what_is_odd(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    formats.save(root / "images/test/999999.jpg", formats.pixels(99))
    found = lines(check("svhn", entry(root, 10, official="vtab1k/svhn")))
    assert "· 1 image files are in no list (e.g. images/test/999999.jpg)" in found
    assert "! 4 test images, SVHN of VTAB-1k has 26,032" in found
    assert any("SVHN of VTAB-1k is published without loss" in line for line in found)
    found = lines(check("dtd", entry(root, 47, official="vtab1k/dtd")))
    assert any("published as JPEG; these pixels were compressed a second" in x for x in found)
    assert found[-1].startswith("usable, ")


def test_what_is_wrong_is_a_finding(tmp_path):
    root = formats.community(tmp_path / "x", LABELS)
    (root / "images/test/000001.jpg").unlink()
    found = check("birds", entry(root))
    assert found[-1].level == "error"
    assert "000001.jpg is missing" in found[-1].text
    assert lines(found)[-1] == "cannot be used as it is"
    assert lines(check("birds", SimpleNamespace(path=None, num_classes=None, options={})))[0] == (
        "✗ Data set 'birds' has no `path:`, so there is no folder to check."
    )


CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def server():
    """A local web server with byte ranges; `cut` makes it end a connection early, once."""
    state = SimpleNamespace(ranges=[], cut=None, missing=set())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in state.missing:
                self.send_error(404)
                return
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            start = int(wanted[6:-1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            body = CONTENT[start:]
            if state.cut is not None:
                body, state.cut = body[: state.cut], None
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()


def file(server, *paths, **options):
    sha = hashlib.sha256(CONTENT).hexdigest()
    urls = [server.url + path for path in paths or ("/a.bin",)]
    return File(urls=urls, **{"sha256": sha, "bytes": len(CONTENT), **options})


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.cut = 1000
    with pytest.raises(UserError, match=r"a\.bin could not be fetched"):
        fetch(file(server), tmp_path)
    assert (tmp_path / "a.bin.part").stat().st_size == 1000
    seen = []
    path = fetch(file(server), tmp_path, lambda name, done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not (tmp_path / "a.bin.part").exists()
    fetch(file(server), tmp_path)
    assert len(server.ranges) == 2


def test_mirrors_and_digests(server, tmp_path):
    server.missing = {"/gone/a.bin"}
    assert fetch(file(server, "/gone/a.bin", "/a.bin"), tmp_path).read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"sha256 begins .* not 000000"):
        fetch(file(server, "/b.bin", sha256="0" * 64), tmp_path)
    assert not list(tmp_path.glob("b.bin*"))
    with pytest.raises(UserError, match="512,000 bytes instead of 5"):
        fetch(file(server, "/b.bin", bytes=5, sha256=None), tmp_path)


def test_a_download_shows_the_licence(server, tmp_path, monkeypatch, capsys):
    known = {"set": Download(title="A set", licence="research use", files=[file(server)])}
    monkeypatch.setattr("snella.data.download.load_downloads", lambda file: known)
    assert main(["data", "download", "set", "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["A set; licence: research use", str(tmp_path / "set" / "a.bin")]


def test_gated_sets_say_how(tmp_path):
    known = {"nabirds": Download(title="NABirds", licence="own", manual="accept the terms at …")}
    with pytest.raises(UserError, match="NABirds cannot be fetched by a program: accept"):
        download("nabirds", known, tmp_path)
    with pytest.raises(UserError, match="Did you mean 'nabirds'"):
        download("nabird", known, tmp_path)


def test_the_shipped_list_is_valid():
    known = load_downloads(ROOT / "config" / "downloads.yaml")
    for name, entry_ in known.items():
        assert entry_.manual or entry_.files, name
        assert entry_.licence, name
        for item in entry_.files:
            assert item.file_name and all(u.startswith(("http://", "https://")) for u in item.urls)


def test_downloads_land_where_the_configuration_looks():
    """An archive's own top folder, and the files that a data set's or a backbone's path names."""
    known, config = (
        load_downloads(ROOT / "config" / "downloads.yaml"),
        load(ROOT / "config/config.yaml"),
    )
    tops = {"cifar100": "cifar-100-python", "food101": "food-101", "cub": "CUB_200_2011",
            "kvasir-seg": "Kvasir-SEG"}  # fmt: skip
    names = {"cifar100": "cifar100-full", "svhn": "svhn-full", "food101": "food101-full"}
    for name in (*tops, "svhn", "oxford_flowers", "stanford_dogs"):
        place = Path("data", known[name].folder, tops.get(name, ""))
        assert place == Path(config.datasets[names.get(name, name)].path), name
    for name, backbone in config.backbones.items():
        if (backbone.file or "").startswith("data/checkpoints/"):
            entry_ = known[name]
            placed = [Path("data", entry_.folder, f.file_name) for f in entry_.files]
            assert entry_.manual or Path(backbone.file) in placed, name
    metrics = {f.file_name for f in known["metrics"].files}
    for setting in ("clip_file", "dino_file", "dinov2_file", "lpips_file"):
        file = Path(config.protocols["dreambooth"][setting])
        assert file.name in metrics and file.parent == Path("data", known["metrics"].folder)


def make_tar(path, name, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, 2 if kind == tarfile.REGTYPE else 0, "/etc"
        archive.addfile(info, io.BytesIO(b"hi"))
    return path


def test_archives_unpack(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    unpack(make_tar(tmp_path / "a.tgz", "data/x.txt"), out)
    assert (out / "data/x.txt").read_bytes() == b"hi"
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("zip/y.txt", "hi")
    assert unpack(tmp_path / "b.zip", out) == [out / "zip"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..\\x"])
def test_archives_never_write_outside(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="would write outside"):
        unpack(make_tar(tmp_path / "a.tgz", name), out)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(name, "hi")
    with pytest.raises(UserError, match="would write outside"):
        unpack(tmp_path / "b.zip", out)
    assert list(out.iterdir()) == []


def test_links_and_damage(tmp_path):
    with pytest.raises(UserError, match="a link or device"):
        unpack(make_tar(tmp_path / "a.tgz", "x", tarfile.SYMTYPE), tmp_path)
    whole = make_tar(tmp_path / "c.tgz", "x").read_bytes()
    (tmp_path / "c.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged|no archive"):
        unpack(tmp_path / "c.tgz", tmp_path)


def make_zip(path, *entries, change=None):
    """A .zip of (name, content), with bytes of it changed."""
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    for local, beyond, value in change or ():
        data[local], data[central + beyond] = value, value
    path.write_bytes(data)
    return path


def as_bytes(path, name):
    """A .zip with one file in a folder of a name in some encoding, which nothing says."""
    placeholder = "x" * len(name)
    data = make_zip(path, (f"{placeholder}/y.txt", "hi")).read_bytes()
    path.write_bytes(data.replace(placeholder.encode(), name))
    return path


def test_names_that_macos_zips_without_saying_that_they_are_utf_8(tmp_path):
    unpack(as_bytes(tmp_path / "a.zip", "é".encode()), tmp_path)
    assert (tmp_path / "é/y.txt").read_bytes() == b"hi"


def special(kind):
    info = zipfile.ZipInfo("x")
    info.create_system, info.external_attr = 3, kind << 16
    return info


GOOD = ("data/x.txt", b"hello " * 99)
ARCHIVES = {
    "encrypted": (lambda p: make_zip(p, GOOD, change=[(6, 8, 1)]), "is encrypted; unpack"),
    "compression": (lambda p: make_zip(p, GOOD, change=[(8, 10, 99)]), "not supported; unpack it"),
    "stream": (lambda p: make_zip(p, GOOD, change=[(45, 1, 255)]), "is damaged .*; delete it"),
    "twice": (lambda p: make_zip(p, GOOD, GOOD), "two files called 'data/x.txt'"),
    "link": (lambda p: make_zip(p, GOOD, (special(0o120777), "/etc")), "'x', a link or device"),
    "pipe": (lambda p: make_zip(p, GOOD, (special(0o010666), "")), "'x', a link or device"),
    "escape": (lambda p: make_zip(p, GOOD, ("a\x1b[31m", "")), "control characters"),
    "file as folder": (lambda p: make_zip(p, ("a", "1"), ("a/b", "2")), "Not a directory"),
    "empty": (lambda p: make_zip(p), "holds no file"),
    "backslashes": (lambda p: make_zip(p, ("data\\x.txt", "1")), "a name with backslashes"),
    "gbk": (lambda p: as_bytes(p, "图像".encode("gbk")), "names in an unknown encoding; unpack"),
    "rar": (lambda p: p.write_bytes(b"Rar!\x1a\7\0"), "no archive .*; unpack it by hand"),
    "bomb": (lambda p: make_zip(p, GOOD, ("b", bytes(2**20))), "that unpack to"),
    "cut": (lambda p: p.write_bytes(make_zip(p, GOOD).read_bytes()[:60]), "damaged .cut short"),
    "page": (lambda p: p.write_bytes(b"<!doctype html>"), "damaged .a web page"),
    "pointer": (lambda p: p.write_bytes(b"version https://git-lfs"), "damaged .a Git LFS pointer"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x" * 999)[:30]), "damaged|no archive"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_is_not_unpacked_leaves_nothing(tmp_path, monkeypatch, case):
    make, words = ARCHIVES[case]
    monkeypatch.setattr("snella.data.archives.BOMB_BYTES", 2**18)
    (tmp_path / "out").mkdir()
    make(tmp_path / "a.zip")
    with pytest.raises(UserError, match=words):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_would_not_fit_on_the_disk_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=100))
    archive = make_zip(tmp_path / "a.zip", GOOD)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"No space left in .*: .* unpacks to 594 bytes"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "an empty file"), (b"\n<?xml?><Error/>", "a web page"),
     (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")],
)  # fmt: skip
def test_what_comes_in_place_of_a_file_is_not_kept(server, tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", content)
    with pytest.raises(UserError, match=words):
        fetch(file(server, sha256=None, bytes=None), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nothing", "http://127.0.0.1:1/x y", "http://[/", "gopher://x/y"])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(UserError, match=r"x\.bin could not be fetched"):
        fetch(File(urls=[url], name="x.bin"), tmp_path)


def test_places_that_cannot_be_written_and_two_at_once(server, tmp_path):
    entry_ = {"a": Download(title="A", licence="own", files=[file(server)])}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*a part of the path is a file"):
        download("a", entry_, tmp_path / "file" / "x")
    (tmp_path / "a/a.bin").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder, where a file is needed"):
        download("a", entry_, tmp_path)
    with (tmp_path / "a/.download.lock").open("w") as lock:
        assert try_lock(lock)
        with pytest.raises(UserError, match="Another process is downloading"):
            download("a", entry_, tmp_path)


@pytest.mark.parametrize("content", [b"a: [", b"- a\n", b"a: {titel: x}\n", b"\xff", b"a: 3\n"])
def test_a_damaged_list_of_downloads_is_one_line(tmp_path, content):
    (tmp_path / "downloads.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"downloads\.yaml"):
        load_downloads(tmp_path / "downloads.yaml")
