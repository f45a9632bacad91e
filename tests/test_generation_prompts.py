"""DreamBooth's prompt file and subject folders, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.tasks.base import DatasetSpec
from snella.tasks.generation.prepare import prepare, sources
from snella.tasks.generation.prompts import NAME, fill_prompt, read_prompts

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
    assert found.templates("dog6") == ["a {0} {1} wearing a santa hat", "a wet {0} {1}"]
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dog6,dog", "dog6", r"line 6: expected `subject_name,class`, found 'dog6'"),
        ("dog6,dog", "backpack,bag", r"line 6: the subject 'backpack' is listed twice"),
        ("{0} {1} in the jungle", "dog in the jungle", r"line 13: .* must contain \{0\} and \{1\}"),
        ("'a wet", "a wet", "line 22: expected a heading or"),
        ("Classes", "Class list", "line 1: expected a heading"),
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
    with pytest.raises(UserError, match=r"00.jpg is not a readable image"):
        prepare("dog6", spec(root), tmp_path / "out")
    with pytest.raises(UserError, match="Unknown option of data set 'dog6': 'subjects'"):
        prepare("dog6", spec(root, subjects="x"), tmp_path / "out")
    (root / NAME).unlink()
    with pytest.raises(UserError, match=r"prompts_and_classes.txt is missing"):
        prepare("dog6", spec(root), tmp_path / "out")
    with pytest.raises(UserError, match=r"has no folder; set `datasets.x.path`"):
        prepare("x", DatasetSpec(kind="dreambooth"), tmp_path / "out")
    with pytest.raises(UserError, match="Unknown kind of data set 'x': 'folder'"):
        prepare("x", DatasetSpec(kind="folder"), tmp_path / "out")
