"""DreamBooth's prompt file and subject folders, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.tasks.base import DatasetSpec
from snella.tasks.generation.prepare import check, prepare, sources
from snella.tasks.generation.prompts import NAME, fill_prompt, read_prompts
from snella.tasks.generation.settings import GenerationSettings

OFFICIAL = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} on top of pink fabric'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]
"""


def write(folder: Path, text: str = OFFICIAL, subject: str = "dog6", images: int = 2) -> Path:
    (folder / subject).mkdir(parents=True)
    (folder / NAME).write_text(text)
    for i in range(images):
        pixels = np.full((20 + i, 30, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / subject / f"0{i}.jpg")
    return folder


def spec(folder: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(kind="dreambooth", path=str(folder), task="generation", options=options)


def test_the_official_layout(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(OFFICIAL)
    found = read_prompts(tmp_path / NAME)
    assert found.class_word("bear_plushie") == "stuffed animal"
    assert found.templates("backpack")[2] == "a cube shaped {0} {1}"
    assert found.templates(found.class_word("dog6")) == [
        "a {0} {1} wearing a santa hat",
        "a wet {0} {1}",
    ]
    assert fill_prompt("a {0} {1} in the snow", "", "dog") == "a dog in the snow"


def test_a_subject_is_prepared_from_its_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "dreambooth" / "dataset")
    described = spec(tmp_path / "dreambooth", subject="dog6")
    prepare("mydog", described, tmp_path / "mydog")
    data = Prepared.open(tmp_path / "mydog")
    assert data.manifest["class_word"] == "dog"
    assert data.images("trainval")[1].shape == (21, 30, 3)
    assert data.targets("test", "image")[0].shape == (20, 30, 3)
    assert sources(described) == [root / NAME, root / "dog6" / "00.jpg", root / "dog6" / "01.jpg"]


def test_own_subjects_need_no_prompt_file(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / NAME).unlink()
    own = spec(root, subject="dog6", class_word="puppy", prompts=["a {0} {1} asleep"])
    prepare("mine", own, tmp_path / "mine")
    assert Prepared.open(tmp_path / "mine").manifest["prompts"] == ["a {0} {1} asleep"]


def test_an_own_dog_gets_the_prompts_of_live_subjects(tmp_path: Path) -> None:
    """Whether or not the prompt file lists it; no prompt is for dogs that are cube shaped."""
    root = write(tmp_path / "data", subject="rex")
    prepare("rex", spec(root, class_word="dog"), tmp_path / "rex")
    assert "a wet {0} {1}" in Prepared.open(tmp_path / "rex").manifest["prompts"]
    assert read_prompts(root / NAME).templates("Dog") == read_prompts(root / NAME).live
    described = spec(root)
    assert root / "rex" / "01.jpg" in sources(described)  # the subject's name is the entry's


@pytest.mark.parametrize(
    "template",
    [
        'the {0} {1}\'s "home"', "{0} {1}: 100 % wool, $5 & #1", "ein {0} {1} über {{Wölfen}}",
        "a {0} {1} \\ 犬",
    ],
)  # fmt: skip
def test_prompts_of_any_characters(tmp_path: Path, template: str) -> None:
    """From a configuration, and from a file with Python's quotes."""
    root = write(tmp_path / "data", OFFICIAL.replace("'a wet {0} {1}'", repr(template)))
    own = spec(root, subject="dog6", class_word="dog", prompts=[template])
    prepare("own", own, tmp_path / "own")
    prepare("dog6", spec(root), tmp_path / "official")
    found = Prepared.open(tmp_path / "own").manifest["prompts"][0]
    assert found == template == Prepared.open(tmp_path / "official").manifest["prompts"][-1]
    assert fill_prompt(found, "sks", "dog") == template.replace("{0}", "sks").replace(
        "{1}", "dog"
    ).replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize(
    "template",
    ["{} {}", "a {0} dog", "{0} {1} {2}", "{0} {1} {", "} {0} {1}", "{0.x} {1}", "{0!r} {1}",
     "{0:5} {1}", "{token} {class_word}"],
)  # fmt: skip
def test_other_braces_are_refused_before_anything_runs(template: str) -> None:
    entry = DatasetSpec(kind="dreambooth", path="x", options={"prompts": [template]})
    with pytest.raises(UserError, match=r"must contain \{0\}.*no other braces; write \{\{"):
        check("x", entry)
    with pytest.raises(ValidationError, match=r"instance_prompt"):
        GenerationSettings(instance_prompt=template.replace("{token} {", "{token.x} {"))


def test_what_an_entry_may_not_say() -> None:
    def entry(**options: Any) -> None:
        check("x", DatasetSpec(kind="dreambooth", path="x", options=options))

    with pytest.raises(UserError, match=r"prompts` has 'a \{0\} \{1\}' twice"):
        entry(prompts=["a {0} {1}", "a {0} {1}"])
    for word in ("", " ", None, 7):
        with pytest.raises(UserError, match="class_word` must be text"):
            entry(class_word=word)


def test_photographs_stand_upright_and_have_eight_bits(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    wide = np.zeros((20, 30, 3), np.uint8)
    wide[:, :10] = 255  # on the left of a camera that was turned
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(wide).save(root / "dog6" / "00.jpg", exif=exif, quality=100)
    prepare("dog6", spec(root), tmp_path / "out")
    data = Prepared.open(tmp_path / "out")
    assert data.images("train")[0].shape == (30, 20, 3)
    assert data.images("train")[0][:8].min() > 200 > 60 > data.images("train")[0][14:].max()
    assert data.encoded("train", "image")[1] == (root / "dog6" / "01.jpg").read_bytes()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "dog6" / "02.png")
    with pytest.raises(UserError, match=r"02.png is not a readable image .pixels of more than 8"):
        prepare("dog6", spec(root), tmp_path / "deep")
    for name in ("01.jpg", "02.png"):
        (root / "dog6" / name).unlink()
    with pytest.raises(UserError, match=r"has one photograph in .*add another"):
        prepare("dog6", spec(root), tmp_path / "one")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dog6,dog", "dog6", r"line 6: expected `subject_name,class`, found 'dog6'"),
        ("dog6,dog", "backpack,bag", r"line 6: the subject 'backpack' is listed twice"),
        ("{0} {1} in the jungle", "dog in the jungle", r"line 13: .* must contain \{0\} .*\{1\}"),
        ("'a wet", "a wet", "line 22: expected a heading or"),
        ("'a wet", r"'a \x wet", "line 22: .* is no text in Python's quotes"),
        ("Classes", "Class list", "line 1: expected a heading"),
        ("{0} {1} in the jungle", "{0} {1} on top of pink fabric", "line 14: .* is listed twice"),
        ("dog6,dog\n", "", "Unknown subject in .*'dog6'"),
    ],
)
def test_a_file_of_another_layout(tmp_path: Path, old: str, new: str, message: str) -> None:
    root = write(tmp_path, OFFICIAL.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        prepare("dog6", spec(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["Object Prompts", "Live Subject Prompts"])
def test_an_empty_part(tmp_path: Path, part: str) -> None:
    head, _, tail = OFFICIAL.partition(part)
    rest = "Live Subject Prompts" + tail.partition("Live Subject Prompts")[2]
    root = write(tmp_path, head + (rest if part == "Object Prompts" else ""))
    with pytest.raises(UserError, match=f"has no prompt under {part}"):
        prepare("dog6", spec(root), tmp_path / "out")


def test_what_can_be_wrong_with_a_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "data", images=0)
    with pytest.raises(UserError, match="Subject 'dog6': no images in"):
        prepare("dog6", spec(root), tmp_path / "out")
    with pytest.raises(UserError, match="Subject 'backpack': no such folder"):
        prepare("backpack", spec(root), tmp_path / "out")
    (root / "dog6" / "00.jpg").write_bytes(b"\xff\xd8\xffnot really")
    with pytest.raises(UserError, match=r"00.jpg is not a readable image \(no image in a format"):
        prepare("dog6", spec(root), tmp_path / "out")
    (root / "dog6" / "00.jpg").write_bytes(b"<!doctype html><html>")
    with pytest.raises(UserError, match=r"00.jpg cannot be decoded: it is a web page"):
        prepare("dog6", spec(root), tmp_path / "out")
    (root / "dog6" / "01.HEIC").write_bytes(b"a telephone's")
    with pytest.raises(UserError, match=r"01.HEIC is of a format that is not read; save it as"):
        prepare("dog6", spec(root), tmp_path / "out")
    (root / "dog6" / "01.HEIC").unlink()
    with pytest.raises(UserError, match="Unknown option of data set 'dog6': 'subjects'"):
        prepare("dog6", spec(root, subjects="x"), tmp_path / "out")
    (root / NAME).unlink()
    with pytest.raises(UserError, match=r"prompts_and_classes.txt is missing"):
        prepare("dog6", spec(root), tmp_path / "out")
    with pytest.raises(UserError, match=r"has no folder; set `datasets.x.path`"):
        prepare("x", DatasetSpec(kind="dreambooth"), tmp_path / "out")
    with pytest.raises(UserError, match="Unknown kind of data set 'x': 'folder'"):
        prepare("x", DatasetSpec(kind="folder"), tmp_path / "out")
