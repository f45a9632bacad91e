"""Published sizes of the data sets in the papers' tables, against which a copy is counted.

From the TFDS catalogue, the VTAB paper and VPT's lists; per-class counts where they are known
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Official:
    """Sizes of a data set; ``trainval`` is train and val together."""

    title: str
    classes: int
    train: int
    val: int
    test: int
    lossless: bool = False
    per_class: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def trainval(self) -> int:
        """Training images with and without labels set aside."""
        return self.train + self.val


_SVHN_TEST = (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595)
_SVHN_TRAIN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)


def _vtab(
    title: str, classes: int, test: int, lossless: bool = False, each: tuple[int, ...] = ()
) -> Official:
    per_class = {"test": each} if each else {}
    return Official(f"{title} of VTAB-1k", classes, 800, 200, test, lossless, per_class)


OFFICIAL: dict[str, Official] = {
    "vtab1k/cifar100": _vtab("CIFAR-100", 100, 10000, True, each=(100,) * 100),
    "vtab1k/caltech101": _vtab("Caltech101", 102, 6084),
    "vtab1k/dtd": _vtab("DTD", 47, 1880, each=(40,) * 47),
    "vtab1k/flowers102": _vtab("Flowers102", 102, 6149),
    "vtab1k/pets": _vtab("Pets", 37, 3669),
    "vtab1k/svhn": _vtab("SVHN", 10, 26032, True, each=_SVHN_TEST),
    "vtab1k/sun397": _vtab("SUN397", 397, 21750),
    "vtab1k/patch_camelyon": _vtab("Patch Camelyon", 2, 32768, True, each=(16391, 16377)),
    "vtab1k/eurosat": _vtab("EuroSAT", 10, 5400),
    "vtab1k/resisc45": _vtab("Resisc45", 45, 6300),
    "vtab1k/retinopathy": _vtab("Retinopathy", 5, 42670),
    "vtab1k/clevr_count": _vtab("Clevr-Count", 8, 15000, True),
    "vtab1k/clevr_dist": _vtab("Clevr-Dist", 6, 15000, True),
    "vtab1k/dmlab": _vtab("DMLab", 6, 22735),
    "vtab1k/kitti_dist": _vtab("KITTI-Dist", 4, 711, True),
    "vtab1k/dsprites_loc": _vtab("dSprites-Loc", 16, 73728, True),
    "vtab1k/dsprites_ori": _vtab("dSprites-Ori", 16, 73728, True),
    "vtab1k/smallnorb_azi": _vtab("SmallNORB-Azim", 18, 12150, True),
    "vtab1k/smallnorb_ele": _vtab("SmallNORB-Elev", 9, 12150, True),
    "fgvc/cub": Official("CUB-200-2011", 200, 5394, 600, 5794),
    "fgvc/nabirds": Official("NABirds", 555, 21536, 2393, 24633),
    "fgvc/oxford_flowers": Official(
        "Oxford Flowers", 102, 1020, 1020, 6149,
        per_class={"train": (10,) * 102, "val": (10,) * 102},
    ),
    "fgvc/stanford_dogs": Official("Stanford Dogs", 120, 10800, 1200, 8580),
    "fgvc/stanford_cars": Official("Stanford Cars", 196, 7329, 815, 8041),
    "full_image/cifar100": Official(
        "CIFAR-100", 100, 50000, 0, 10000, True, {"train": (500,) * 100, "test": (100,) * 100}
    ),
    "full_image/svhn": Official(
        "SVHN", 10, 73257, 0, 26032, True, {"train": _SVHN_TRAIN, "test": _SVHN_TEST}
    ),
    "full_image/food101": Official(
        "Food-101", 101, 75750, 0, 25250, False, {"train": (750,) * 101, "test": (250,) * 101}
    ),
}  # fmt: skip


def differences(
    name: str,
    counts: Mapping[str, int],
    num_classes: int,
    per_class: Mapping[str, list[int]] | None = None,
) -> list[str]:
    """How a copy's counts differ from the published ones, one sentence each.

    Training images may lie in train and val as published, or all in train.
    """
    known = OFFICIAL[name]
    found = []
    if num_classes != known.classes:
        found.append(f"{num_classes} classes, {known.title} has {known.classes}")
    training = counts["train"] + counts.get("val", 0)
    if training != known.trainval:
        found.append(f"{training:,} training images, {known.title} has {known.trainval:,}")
    elif counts.get("val") and counts["val"] != known.val:
        found.append(
            f"{counts['train']:,} train and {counts['val']:,} val images, {known.title} has "
            f"{known.train:,} and {known.val:,}"
        )
    elif name.startswith("fgvc/") and not counts.get("val"):
        found.append(
            "no validation images, so `train` is the whole training set: the 90 % that published "
            "numbers trained on are in VPT's json lists, `options: {val_share: 0.1}` makes others"
        )
    if counts["test"] != known.test:
        found.append(f"{counts['test']:,} test images, {known.title} has {known.test:,}")
    for split, expected in known.per_class.items():
        have = (per_class or {}).get(split)
        if have and sum(have) == sum(expected) and list(expected) != have:
            odd = next(i for i, (a, b) in enumerate(zip(have, expected, strict=False)) if a != b)
            found.append(
                f"class {odd} has {have[odd]} {split} images, {known.title} has {expected[odd]}"
            )
    return found
