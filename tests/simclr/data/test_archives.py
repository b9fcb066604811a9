"""Tar and zip archives as trees: names as in a folder, tars within a tar, links, damage, and several archives as one tree."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simclr.data.sources import members, tar
from simclr.data.sources.archives import archive_tree, archives_tree
from simclr.data.sources.joined import joined
from simclr.data.sources.layout import understand
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Part, Source, Tree, divided
from simclr.data.sources.tar import stem, stems
from simclr.errors import UserError

FILES = {f"train/{kind}/{i}.jpg": f"{kind} {i}".encode() * (i * 300 + 1) for kind in ("cat", "dog") for i in range(5)}
ENDINGS = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2")


def packed(path: Path, files: Mapping[str, bytes | str], form: int = tarfile.DEFAULT_FORMAT) -> Path:
    """A tar of `files`: path → content, or after > the target of a hard link, after -> of a symbolic one."""
    mode = {"gz": "w:gz", "xz": "w:xz", "bz2": "w:bz2"}.get(path.name.rpartition(".")[2], "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as file:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                member.linkname = content.lstrip("->")
                file.addfile(member)
            else:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def read(tree: Tree) -> dict[str, object]:
    """Everything in a tree; each part gives the names that it says."""
    found: dict[str, object] = {}
    for part in tree.parts:
        given = dict(tree.read(part))
        assert not part.names or tuple(given) == part.names
        assert part.names or all(name.startswith(part.name + "/") for name in given)
        assert not found.keys() & given.keys()
        found |= given
    return found


@pytest.mark.parametrize("ending", [*ENDINGS, ".zip"])
def test_an_archive_is_a_folder_that_is_called_like_it(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"./train/cat/new\nline.jpg": b"odd", "/train/cat/ünï.PNG": b"unicode", "a/../train/dog/up.jpg": b"up"}
    other = {"labels.csv": b"a,b", "train/._0.jpg": b"hidden", "readme": b"", "train/@eaDir/0.jpg": b"thumbnail", "__MACOSX/a/0.jpg": b"x"}
    path = tmp_path / f"photos{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in (FILES | odd | other).items():
                file.writestr(name, content)
            file.mkdir("empty")
    else:
        packed(path, FILES | odd | other)
    monkeypatch.setattr(members, "divided", lambda name, names, most=4: divided(name, names, most))
    tree = archive_tree(path, "sets/photos", "s3://bucket/photos")
    names = {"./train/cat/new\nline.jpg": "train/cat/new\nline.jpg", "/train/cat/ünï.PNG": "train/cat/ünï.PNG"}
    names["a/../train/dog/up.jpg"] = "a/train/dog/up.jpg"
    assert read(tree) == {f"sets/photos/{names.get(name, name)}": content for name, content in (FILES | odd).items()}
    assert {name: text() for name, text in tree.texts.items()} == {"sets/photos/labels.csv": b"a,b"}
    assert (dict(tree.ignored), dict(tree.junk)) == ({".csv": 1, "hidden": 1, "none": 1}, {"@eaDir": 1, "__MACOSX": 1})
    assert {len(part.names) for part in tree.parts} == ({4, 1} if ending in (".tar", ".zip") else {13})  # a compressed tar is one part
    assert tree.spec == "s3://bucket/photos" and tree.identity == members.ends_of(path) and tree.times
    some = (tree.parts[0].names[1], tree.parts[0].names[3])
    assert list(tree.read(Part("", some))) == [(name, FILES[name.removeprefix("sets/photos/")]) for name in some]


def test_a_sample_of_a_compressed_archive_ends_at_its_last_picture(tmp_path: Path) -> None:
    noise = {f"{i}.jpg": random.Random(i).randbytes(200_000) for i in range(8)}
    path = packed(tmp_path / "noise.tar.gz", noise)
    tree = archive_tree(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # cut after it was listed
    assert list(tree.read(Part("", ("1.jpg", "2.jpg")))) == [(name, noise[name]) for name in ("1.jpg", "2.jpg")]
    with pytest.raises(UserError, match=r"noise.tar.gz ends early or is damaged \(.*\); fetch it again"):
        list(tree.read(tree.parts[0]))


def test_many_threads_read_one_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, content in FILES.items():
            file.writestr(name, content)
    for tree in (archive_tree(packed(tmp_path / "a.tar", FILES)), archive_tree(tmp_path / "a.zip")):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, [tree] * 4)) == [FILES] * 4


def imagenet(root: Path) -> dict[str, bytes]:
    """The files of ImageNet as they come, of three classes that lie in another order in the archive than by name; their pictures."""
    inner = {
        f"n{wnid}.tar": packed(root / "inner.tar", {f"n{wnid}_{i}.JPEG": f"{wnid} {i}".encode() * 999 for i in (7, 2)}).read_bytes()
        for wnid in ("03", "01", "02")
    }
    (root / "inner.tar").unlink()
    packed(root / "ILSVRC2012_img_train.tar", inner)
    val = {f"ILSVRC2012_val_0000000{i}.JPEG": f"val {i}".encode() for i in (1, 2, 3)}
    packed(root / "ILSVRC2012_img_val.tar", val)
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    packed(root / "ILSVRC2012_devkit_t12.tar.gz", {truth: b"3\n1\n2\n", "ILSVRC2012_devkit_t12/data/meta.mat": b"synsets"})
    train = {f"ILSVRC2012_img_train/n{w}/n{w}_{i}.JPEG": f"{w} {i}".encode() * 999 for w in ("03", "01", "02") for i in (7, 2)}
    return train | {f"ILSVRC2012_img_val/{name}": content for name, content in val.items()}


def test_imagenet_as_downloaded_is_one_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a thousand tars of classes; of so many, each is listed when it is read."""
    monkeypatch.setattr(tar, "_FEW_INNER", 2)
    pictures = imagenet(tmp_path)
    tree = archives_tree(str(tmp_path), {stem(path.name): path for path in sorted(tmp_path.iterdir())})
    assert read(tree) == pictures
    inner = [part.name for part in tree.parts if not part.names]  # in the order of the archive
    assert inner == [f"ILSVRC2012_img_train/n{wnid}" for wnid in ("03", "01", "02")]
    devkit = "ILSVRC2012_devkit_t12/ILSVRC2012_devkit_t12/data/"
    assert {name: text() for name, text in tree.texts.items()} == {
        f"{devkit}ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n",
        f"{devkit}meta.mat": b"synsets",
    }
    assert tree.identity and tree.identity != archives_tree("", {"a": tmp_path / "ILSVRC2012_img_train.tar"}).identity
    alone = archive_tree(tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    assert not alone.parts and len(alone.texts) == 2 and alone.ignored == {".mat": 1, ".txt": 1}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_tars_within_a_tar_may_be_compressed_and_deep(tmp_path: Path, ending: str) -> None:
    deep = packed(tmp_path / "deep.tar", {"x/deep.jpg": b"deep"}).read_bytes()
    plain = packed(tmp_path / "plain.tar", {"a.jpg": b"a", "notes.md": b"", "sub.tar": deep, ".thumbs/a.jpg": b"t", "h.jpg": ">a.jpg"})
    zipped = gzip.compress(packed(tmp_path / "zipped.tar", {"b.jpg": b"b"}).read_bytes())
    outer = {"train/cat.tar": plain.read_bytes(), "train/dog.tgz": zipped, "train/c.jpg": b"c", "more.zip": b"PK"}
    tree = archive_tree(packed(tmp_path / f"outer{ending}", outer))
    expected = {"train/c.jpg": b"c", "train/cat/a.jpg": b"a", "train/cat/h.jpg": b"a", "train/cat/sub/x/deep.jpg": b"deep"}
    expected |= {"train/dog/b.jpg": b"b"} if ending == ".tar" else {}
    assert read(tree) == read(tree) == expected
    assert tree.ignored == {".zip": 1, ".md": 1} | ({".tgz": 1} if ending == ".tar.gz" else {}) and tree.junk == {".thumbs": 1}
    assert len(list(Source(spec="", parts=tree.parts, read=tree.read).sample(2))) == 2  # type: ignore[arg-type]


def test_two_archives_that_would_be_the_same_folder_are_refused(tmp_path: Path) -> None:
    inner = packed(tmp_path / "a.tar", {"a.jpg": b"a"}).read_bytes()
    with pytest.raises(UserError, match=r"a.tar and a.tar.gz in .*outer.tar would be the same folder a; move one of them away"):
        archive_tree(packed(tmp_path / "outer.tar", {"a.tar": inner, "a.tar.gz": gzip.compress(inner)}))
    with pytest.raises(UserError, match=r"x/a.tar and x/a.zip in here would be"):
        stems(["x/a.tar", "a.tar", "x/a.zip"], "here")
    assert stems(["x/a.tar", "a.tgz"], "here") == {"x/a": "x/a.tar", "a": "a.tgz"}


def test_links_in_an_archive_are_followed(tmp_path: Path) -> None:
    linked: dict[str, bytes | str] = {
        "first.jpg": "->./store/2",
        "early.jpg": "->store/1",
        "store/1": b"one",
        "train/cat/hard.jpg": ">store/1",
        "train/cat/soft.jpg": "->../../train/dog/again.jpg",
        "train/dog/again.jpg": "->../../store/2",
        "store/2": b"two",
        "lost.jpg": "->/home/somebody/lost.jpg",
        "round.jpg": "->round.jpg",
        "train/bird": "->../store",
    }
    expected = {"early.jpg": b"one", "train/cat/hard.jpg": b"one"}
    expected |= {"first.jpg": b"two", "train/cat/soft.jpg": b"two", "train/dog/again.jpg": b"two"}
    for ending in (".tar", ".tar.gz"):
        tree = archive_tree(packed(tmp_path / f"links{ending}", linked))
        assert list(read(tree).items()) == list(expected.items())  # in the order of what they lead to: no reading back and forth
        assert tree.ignored == {"none": 2, "link": 3}
        assert tree.notes == (f"3 links in {tree.spec} lead to no file of it (to a folder, or out of it), as lost.jpg; they are left out",)
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as file:
        for name, content in linked.items():
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (0o120777 if isinstance(content, str) else 0o100644) << 16
            if name != "train/cat/hard.jpg":
                file.writestr(info, content.removeprefix("->") if isinstance(content, str) else content)
    assert read(archive_tree(tmp_path / "links.zip")) == {name: data for name, data in expected.items() if "hard" not in name}


def test_a_file_with_holes_and_a_file_packed_again_are_read_as_tar_unpacks_them(tmp_path: Path) -> None:
    with (tmp_path / "holes.bmp").open("wb") as file:
        file.write(b"BM" * 4096)
        file.seek(1 << 20)
        file.write(b"end" * 1000)
    os.system(f"cd {tmp_path} && tar -S --format=gnu -cf gnu.tar holes.bmp && tar -S --format=posix -cf posix.tar holes.bmp")
    for form in ("gnu", "posix"):
        assert (tmp_path / f"{form}.tar").stat().st_size < 1 << 18
        assert read(archive_tree(tmp_path / f"{form}.tar")) == {"holes.bmp": (tmp_path / "holes.bmp").read_bytes()}
    packed(tmp_path / "twice.tar", {"a.jpg": b"old", "c.jpg": "->b.jpg", "./a.jpg": b"new", "b.jpg": b"b", "./c.jpg": b"c"})
    tree = archive_tree(tmp_path / "twice.tar")
    assert read(tree) == {"a.jpg": b"new", "b.jpg": b"b", "c.jpg": b"c"}
    assert tree.notes == (f"1 files of {tree.spec} were packed again later, as a.jpg; the last of each counts",)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cut_archive_is_found_when_it_is_listed(tmp_path: Path, ending: str) -> None:
    noise = {f"{i}.jpg": random.Random(i).randbytes(3_000) for i in range(20)}
    whole = packed(tmp_path / f"whole{ending}", noise).read_bytes()
    cut = tmp_path / f"cut{ending}"
    for size in (0, 100, len(whole) // 3, len(whole) // 2 // 512 * 512, 10 * (512 + 3072)):  # of a plain one the last is ten members
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"cut{ending} ends early or is damaged \(.*\); fetch it again"):
            archive_tree(cut)
    damaged = bytearray(whole)
    at = 10 * (512 + 3072) + 100 if ending == ".tar" else len(whole) // 2
    damaged[at : at + 100] = bytes(100)  # of a plain one a header
    cut.write_bytes(damaged)
    with pytest.raises(UserError, match="ends early or is damaged"):
        archive_tree(cut)


def test_an_archive_that_goes_on_behind_its_end_is_refused(tmp_path: Path) -> None:
    """Of two tars in one file tar itself reads the first alone, and of a file with a hole what lies before the hole."""
    one = packed(tmp_path / "one.tar", FILES).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    (tmp_path / "hole.tar").write_bytes(one + bytes(3 << 20))
    for name in ("two", "hole"):
        with pytest.raises(UserError, match=f"{name}.tar has an end mark with more behind it"):
            archive_tree(tmp_path / f"{name}.tar")


def test_an_inner_archive_that_is_cut_does_not_go_on_in_the_next(tmp_path: Path) -> None:
    inner = packed(tmp_path / "inner.tar", FILES).read_bytes()
    cut = inner[: inner.rindex(b"dog 4" * 10) // 512 * 512]
    for ending in (".tar", ".tar.gz"):
        path = packed(tmp_path / f"outer{ending}", {"a.tar": cut, "b.tar": inner})
        with pytest.raises(UserError, match="ends early or is damaged"):
            read(archive_tree(path))


def test_what_a_zip_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as file:
        dos = zipfile.ZipInfo("train\\cat\\a.jpg")
        dos.create_system = 0
        file.writestr(dos, b"a")
        file.writestr("inner.zip", b"PK")
        file.writestr("b.jpg", b"b" * 100)
    tree = archive_tree(path)
    assert read(tree) == {"train/cat/a.jpg": b"a", "b.jpg": b"b" * 100} and tree.ignored == {".zip": 1}
    with monkeypatch.context() as patched:
        patched.setattr(members, "MOST_PICTURE_BYTES", 99)
        bomb = archive_tree(path)
    assert read(bomb) == {"train/cat/a.jpg": b"a"} and bomb.ignored["over 0 MiB"] == 1
    assert "1 pictures of" in bomb.notes[0] and "b.jpg has 0 MiB, more than a picture in an archive may have (0)" in bomb.notes[0]
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\1\2")  # the directory's entry of b.jpg
    for offset, value, sentence in ((8, 1, "b.jpg in .* is encrypted; unpack it"), (10, 9, r"packed by method 9 \(deflate64\)")):
        changed = bytearray(raw)
        changed[at + offset : at + offset + 2] = struct.pack("<H", value)
        (tmp_path / "changed.zip").write_bytes(changed)
        with pytest.raises(UserError, match=sentence):
            archive_tree(tmp_path / "changed.zip")
    (tmp_path / "cut.zip").write_bytes(raw[:-30])
    with pytest.raises(UserError, match=r"cut.zip ends early or is damaged"):
        archive_tree(tmp_path / "cut.zip")
    flipped = raw.replace(b"b" * 100, b"b" * 99 + b"c", 1)
    (tmp_path / "flipped.zip").write_bytes(flipped)
    with pytest.raises(UserError, match=r"flipped.zip ends early or is damaged \(Bad CRC-32"):
        read(archive_tree(tmp_path / "flipped.zip"))


def test_a_large_file_is_not_looked_at_for_classes_and_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_MOST_TEXT_BYTES", 2)
    files = {"a.jpg": b"a", "labels.csv": b"a,b", "b.txt": b"ab", "c.txt": b"abc"}
    tree = archive_tree(packed(tmp_path / "a.tar", files))
    assert list(tree.texts) == ["b.txt"] and tree.ignored == {".csv": 1, ".txt": 2}
    assert tree.notes == (
        f"labels.csv in {tree.spec} has 0 MiB and was not looked at for classes, nor were 1 others of more than 0 MiB; "
        "unpack it and give it as --labels FILE",
    )
    assert understand(tree, Reading())[0].total == 1  # nothing is refused


def test_trees_are_joined_and_nothing_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive beside the folder that was unpacked from it gives each picture once, and a note says so."""
    packed_one = archive_tree(packed(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": b"2"}), "a")
    files = {"a/2.jpg": b"two", "a/3.jpg": b"3"}
    loose = Tree(
        spec="loose", parts=divided("a", list(files)), read=lambda part: ((n, files[n]) for n in part.names), stated={"a/3.jpg": "three"}
    )
    tree = joined("both", [packed_one, loose])
    assert read(tree) == {"a/1.jpg": b"1", "a/2.jpg": b"2", "a/3.jpg": b"3"}
    assert tree.notes == (
        "1 pictures are in two archives or folders called alike, as a/2.jpg; each counts once",
        "2 pictures state no class in data, as 1 others do (loose), and have none",
    )
    assert tree.stated == {"a/3.jpg": "three"} and joined("one", [packed_one]).identity == packed_one.identity
    inner = {"x.tar": packed(tmp_path / "x.tar", {"1.jpg": b"1"}).read_bytes()}
    twins = {f"y{i}": packed(tmp_path / f"{i}.tar", inner) for i in (1, 2)}
    assert joined("", [archive_tree(path, "y") for path in twins.values()]).notes[0].startswith("1 pictures are in two archives")
    monkeypatch.setattr(tar, "_FEW_INNER", 0)
    assert set(read(archives_tree("", twins))) == {"y1/x/1.jpg", "y2/x/1.jpg"}
    with pytest.raises(UserError, match="two archives y/x"):
        joined("", [archive_tree(path, "y") for path in twins.values()])
