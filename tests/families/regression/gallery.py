"""Examples for the page: the first test image, with what each method found."""

from collections.abc import Sequence

import numpy as np

from snella.tasks import Gallery, GalleryLine, Shown


def gallery(shown: Sequence[Shown]) -> list[Gallery]:
    """One line: the image, and for every method its place as a white pixel."""
    image = shown[0].data.images("test")[0]
    marked, captions = [], []
    for run in shown:
        place = np.load(run.predictions / "places.npy")[0]
        picture = image.copy()
        picture[tuple((place * 15.99).astype(int))] = 255
        marked.append(picture)
        captions.append(f"{place[0]:.2f}, {place[1]:.2f}")
    line = GalleryLine("first image", [image, *marked], ["", *captions])
    heads = ["Image", *(run.method for run in shown)]
    return [Gallery("", "The first test image.", heads, [line])]
