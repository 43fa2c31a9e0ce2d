"""COCO data: reading, labels, what is put right, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from adn.data.coco import Category, CocoImages, _read_json, collate, open_coco

COCO_MINI = Path(os.environ.get("ADN_COCO_MINI", Path(__file__).parents[3] / "shared" / "data" / "coco_mini"))

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def an_object(image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0,
            "segmentation": [[0, 0, 1, 1, 0, 1]], **more}


def content() -> dict[str, Any]:
    """Three images of 40 x 30, in the order 7, 3, 5; the last has no object."""
    objects = [
        an_object(7, 90, [1, 2, 3, 4], id=4),
        an_object(3, 1, [10.5, 0, 20, 30], id=0),
        an_object(7, 13, [30, 20, 100, 100], id=9, area=77.5),  # over the edge
        an_object(7, 1, [-5, -5, 10.25, 10], id=11),  # over the other one
        an_object(3, 13, [5, 5, 20, 20], id=12, iscrowd=1),
        an_object(3, 13, [5, 5, 0, 20], id=13),  # no width
        an_object(3, 13, [50, 5, 9, 9], id=14),  # outside
    ]
    images = [{"id": i, "file_name": f"{name}.png", "width": 40, "height": 30} for i, name in
              ((7, "first"), (3, "second"), (5, "third"))]
    return {"images": images, "annotations": objects, "categories": [*CATEGORIES]}


def write(folder: Path, data: Any, sizes: dict[str, tuple[int, int]] | None = None) -> tuple[Path, Path]:
    """Pictures (of another size where `sizes` says so) and annotations: two paths, as `CocoImages` takes them."""
    (folder / "images").mkdir(exist_ok=True)
    for i, image in enumerate(data["images"] if isinstance(data, dict) and "images" in data else []):
        size = (sizes or {}).get(image["file_name"], (40, 30))
        Image.new("RGB", size, (10 * i, 0, 0)).save(folder / "images" / image["file_name"])
    file = folder / "instances.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "images", file


def test_labels_follow_ascending_category_ids_with_gaps(tmp_path: Path) -> None:
    data = CocoImages(*write(tmp_path, content()))
    assert data.categories == [Category(1, "person"), Category(13, "stop sign"), Category(90, "toothbrush")]
    assert data.class_names == ["person", "stop sign", "toothbrush"]
    assert data.image_ids.tolist() == [7, 3, 5]
    assert [data[i][1]["labels"].tolist() for i in range(3)] == [[2, 1, 0], [0], []]


def test_boxes_are_clipped_and_those_without_area_and_crowds_left_out(tmp_path: Path) -> None:
    data = CocoImages(*write(tmp_path, content()))
    image, target = data[0]
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [30, 20, 40, 30], [0, 0, 5.25, 5]]
    assert target["boxes"].canvas_size == (30, 40)
    assert target["boxes"].dtype == torch.float32
    assert target["image_id"].item() == 7
    assert target["size"].tolist() == [40, 30]
    assert data[1][1]["boxes"].tolist() == [[10.5, 0, 30.5, 30]]
    _, empty = data[2]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)
    assert {target[key].dtype for key in ("labels", "image_id", "size")} == {torch.int64}
    assert data.notes == ["boxes that reach over the edge of their image, and are clipped: 2",
                          "boxes without area in their image, which are not trained on: 2"]


def test_rounding_at_the_edge_is_no_fault(tmp_path: Path) -> None:
    described = content()
    described["annotations"] = [an_object(7, 1, [0, 0, 40.3, 30]), an_object(7, 1, [1, 1, 39.6, 3], iscrowd=0)]
    data = CocoImages(*write(tmp_path, described))
    assert data[0][1]["boxes"].tolist() == [[0, 0, 40, 30], [1, 1, 40, 4]]
    assert data.notes == ["boxes that reach over the edge of their image, and are clipped: 1"]


def test_ground_truth_has_every_annotation_as_it_was(tmp_path: Path) -> None:
    described = content()
    for key in ("iscrowd", "area", "id"):
        described["annotations"][0].pop(key)
    data = CocoImages(*write(tmp_path, described))
    truth = data.ground_truth()
    assert truth["categories"] == sorted(CATEGORIES, key=lambda c: c["id"])
    assert truth["images"] == described["images"]
    expected = sorted(described["annotations"], key=lambda a: [7, 3, 5].index(a["image_id"]))
    assert [a["id"] for a in truth["annotations"]] == list(range(1, 8))
    for ours, theirs in zip(truth["annotations"], expected, strict=True):
        assert {key: ours[key] for key in ("image_id", "category_id", "bbox")} == {
            key: theirs[key] for key in ("image_id", "category_id", "bbox")}
        assert ours["iscrowd"] == theirs.get("iscrowd", 0)
        assert ours["area"] == theirs.get("area", 12)
    assert [a["image_id"] for a in data.ground_truth([3, 5])["annotations"]] == [3] * 4
    assert [i["id"] for i in data.ground_truth(iter([5]))["images"]] == [5]


def test_against_pycocotools(tmp_path: Path) -> None:
    """The same objects for every image of a file with many."""
    COCO = pytest.importorskip("pycocotools.coco").COCO
    rng = np.random.default_rng(0)
    described = {"images": [{"id": int(i), "file_name": f"{i}.png", "width": 40, "height": 30}
                            for i in rng.permutation(50)[:20]], "categories": CATEGORIES}
    described["annotations"] = [
        an_object(int(rng.choice([i["id"] for i in described["images"]])), int(rng.choice([1, 13, 90])),
                  [float(v) for v in (*rng.uniform(0, 20, 2), *rng.uniform(1, 10, 2))], id=n,
                  iscrowd=int(rng.random() < 0.2)) for n in range(1, 200)]
    folder, file = write(tmp_path, described)
    theirs, ours = COCO(str(file)), CocoImages(folder, file)
    assert ours.notes == []
    for _, target in ours:
        objects = theirs.imgToAnns[target["image_id"].item()]
        kept = [a for a in objects if not a["iscrowd"]]
        assert [ours.categories[k].id for k in target["labels"].tolist()] == [a["category_id"] for a in kept]
        xyxy = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in kept)]
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor),
                                   torch.tensor(xyxy).reshape(-1, 4), rtol=0, atol=1e-5)


def test_transform_gets_image_and_target(tmp_path: Path) -> None:
    data = CocoImages(*write(tmp_path, content()), transform=lambda image, target: (image.size, len(target["labels"])))
    assert [data[i] for i in range(3)] == [((40, 30), 3), ((40, 30), 1), ((40, 30), 0)]
    assert data[-1] == data[2]
    with pytest.raises(IndexError):
        data[3]


def test_pictures_become_rgb(tmp_path: Path) -> None:
    folder, file = write(tmp_path, content())
    Image.new("LA", (40, 30), (90, 255)).save(folder / "first.png")
    image, _ = CocoImages(folder, file)[0]
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (90, 90, 90)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled(tmp_path: Path, mode: str) -> None:
    folder, file = write(tmp_path, content())
    pixels = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    name = "first.png" if mode == "I;16" else "first.tif"
    Image.frombytes(mode, (40, 30), (pixels if mode == "I;16" else pixels.byteswap()).tobytes()).save(folder / name)
    if mode == "I;16B":
        (folder / name).rename(folder / "first.png")
    image, _ = CocoImages(folder, file)[0]
    np.testing.assert_allclose(np.asarray(image), (pixels[..., None] / 257).round().repeat(3, -1), atol=1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_unknown_range_are_no_picture(tmp_path: Path, mode: str) -> None:
    folder, file = write(tmp_path, content())
    Image.fromarray(np.ones((30, 40), np.int32 if mode == "I" else np.float32)).save(folder / "a.tif")
    (folder / "a.tif").rename(folder / "first.png")
    data = CocoImages(folder, file)
    assert data[0] is None
    assert data.unreadable == [str(folder / "first.png")]


def oriented(path: Path, size: tuple[int, int], orientation: int) -> None:
    image = Image.new("RGB", size)
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_exif_orientation_counts_only_if_the_annotations_were_made_with_it(tmp_path: Path) -> None:
    folder, file = write(tmp_path, content())
    oriented(folder / "first.png", (40, 30), 6)  # stored as the annotations say: left alone
    oriented(folder / "second.png", (30, 40), 6)  # a quarter turn to the right makes it 40 x 30
    data = CocoImages(folder, file)
    assert data[0][0].getpixel((0, 0)) == (255, 255, 255)
    turned, _ = data[1]
    assert turned.size == (40, 30)
    assert turned.getpixel((39, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("box", "said"), [
    ([5, 5, 10, 10], r"first\.png is to be shown turned, as its EXIF data say \(1 such images among 3\)"),
    ([5, 30, 10, 9], r"boxes of .*first\.png reach over its edge, and would not if it were turned .*drawn on"),
    ([5, 31, 30, 9], r"first\.png is to be shown turned"),  # fits neither way
])
def test_boxes_drawn_on_turned_pictures_are_noticed(tmp_path: Path, box: list[float], said: str) -> None:
    data = content()
    data["annotations"] = [an_object(7, 1, box)]
    folder, file = write(tmp_path, data)
    oriented(folder / "first.png", (40, 30), 6)
    notes = [note for note in CocoImages(folder, file).notes if "EXIF" in note]
    assert len(notes) == 1
    assert re.search(said, notes[0])
    oriented(folder / "first.png", (30, 40), 6)  # measured as it is shown: in order
    assert not any("EXIF" in note for note in CocoImages(folder, file).notes)


def test_turned_pictures_are_noticed_by_their_boxes_wherever_they_are(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(40)]
    data = content() | {"images": images, "annotations": [an_object(33, 1, [5, 30, 10, 9])]}
    folder, file = write(tmp_path, data)
    oriented(folder / "33.png", (40, 30), 6)
    assert any("boxes of" in note and "33.png" in note for note in CocoImages(folder, file).notes)


def test_boxes_in_parts_of_the_image_are_an_error(tmp_path: Path) -> None:
    data = content()
    data["annotations"] = [an_object(7, 1, [0.1, 0.2, 0.5, 0.6]), an_object(3, 1, [0, 0, 1, 1])]
    with pytest.raises(ValueError, match=r"no number of its 2 boxes is above 1.*multiply"):
        CocoImages(*write(tmp_path, data))
    data["annotations"].append(an_object(3, 1, [0, 0, 1.5, 1]))  # one of a pixel and a half: pixels
    assert len(CocoImages(*write(tmp_path, data))) == 3


def test_categories_of_one_name_are_noticed(tmp_path: Path) -> None:
    data = content()
    assert not any("categories" in note for note in CocoImages(*write(tmp_path, data)).notes)
    data["categories"].append({"id": 91, "name": " toothbrush"})
    notes = CocoImages(*write(tmp_path, data)).notes
    assert any("categories 90 and 91 are all called 'toothbrush'" in note and "1 and 0 objects" in note
               for note in notes)


@pytest.mark.parametrize(("largest", "said"), [(4095, "multiply them by 16"), (1000, "multiply them by 64"),
                                               (4096, None), (65535, None), (0, None)])
def test_few_bits_of_sixteen_are_noticed(tmp_path: Path, largest: int, said: str | None) -> None:
    folder, file = write(tmp_path, content())
    for name in ("first", "second", "third"):
        pixels = np.linspace(0, largest, 1200).astype(np.uint16).reshape(30, 40)
        Image.frombytes("I;16", (40, 30), pixels.tobytes()).save(folder / f"{name}.png")
    notes = [note for note in CocoImages(folder, file).notes if "16-bit" in note]
    assert len(notes) == (said is not None)
    assert said is None or (said in notes[0] and f"no number above {largest}" in notes[0])


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path: Path) -> None:
    data = CocoImages(*write(tmp_path, content(), sizes={"second.png": (20, 15)}))
    assert len(data[0]) == 2
    assert data[1] is None
    assert [os.path.basename(path) for path in data.unreadable] == ["second.png"]


def test_images_that_were_all_resized_are_an_error(tmp_path: Path) -> None:
    sizes = {f"{name}.png": (20, 15) for name in ("first", "second", "third")}
    with pytest.raises(ValueError, match=r"first.png has 20 x 15 pixels, but .* is for 40 x 30.* for 3 images"):
        CocoImages(*write(tmp_path, content(), sizes=sizes))


def test_numbers_in_other_forms(tmp_path: Path) -> None:
    """Null is what is absent; a whole number may be written as a floating one."""
    data = content()
    data["images"][0] |= {"width": 40.0, "id": 7.0}
    data["annotations"][0] |= {"iscrowd": None, "area": None}
    truth = CocoImages(*write(tmp_path, data)).ground_truth()["annotations"]
    assert (truth[0]["image_id"], truth[0]["iscrowd"], truth[0]["area"]) == (7, 0, 12.0)


def test_what_can_be_learnt_from(tmp_path: Path) -> None:
    assert CocoImages(*write(tmp_path, content())).trainable == 4  # but for a crowd and two without area


def test_names_on_one_line(tmp_path: Path) -> None:
    assert CocoImages(*write(tmp_path, with_entry("categories", 1, name="a\n person"))).class_names[0] == "a person"


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_and_damaged_pictures_are_left_out_and_remembered(tmp_path: Path, workers: int) -> None:
    folder, file = write(tmp_path, content())
    (folder / "first.png").unlink()
    (folder / "second.png").write_bytes((folder / "second.png").read_bytes()[:40])
    data = CocoImages(folder, file, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    loader = DataLoader(data, 2, num_workers=workers, collate_fn=collate)
    first, second = [*loader, *loader][2:]
    assert first is None
    assert second[0].shape == (1, 3, 30, 40)
    assert [target["image_id"].item() for target in second[1]] == [5]
    assert data.unreadable == [str(folder / "first.png"), str(folder / "second.png")]


def test_masks(tmp_path: Path) -> None:
    """Of polygons, of run lengths as numbers and as text, and of an object without outline."""
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[4:9, 10:22] = 1
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=2, append=2)))]
    runs = [0, *runs] if mask[0, 0] else runs
    tools = pytest.importorskip("pycocotools.mask")
    text = tools.encode(np.asfortranarray(mask))["counts"].decode()
    outlines = [[[10, 4, 22, 4, 22, 9, 10, 9]], {"counts": runs, "size": [30, 40]},
                {"counts": text, "size": [30, 40]}, [[10, 4, 16, 4, 16, 9, 10, 9], [16, 4, 22, 4, 22, 9, 16, 9]], None]
    described = content() | {"annotations": [
        an_object(3, 1, [10, 4, 12, 5], id=i, segmentation=outline) for i, outline in enumerate(outlines)]}
    data = CocoImages(*write(tmp_path, described), masks=True)
    data = pickle.loads(pickle.dumps(data))
    *masks, none = data[1][1]["masks"]
    for found in masks:
        assert found.dtype == torch.bool
        assert found.tolist() == mask.astype(bool).tolist()
    assert not none.any()
    assert data[2][1]["masks"].shape == (0, 30, 40)
    described["annotations"] = [*described["annotations"][:1], an_object(3, 1, [5, 5, 0, 0], id=7)]
    assert CocoImages(*write(tmp_path, described), masks=True)[1][1]["masks"].shape == (1, 30, 40)


@pytest.mark.parametrize(("outline", "message"), [
    ([[1, 2, 3, 4]], "segmentation of annotations\\[0\\] must be polygons of three points or more"),
    ([[1, 2, 3, 4, 5, "6"]], "must be polygons"), ({"counts": [3]}, "must be polygons"), ("a", "must be polygons"),
    ({"counts": [1200], "size": [40, 30]}, "has a size of \\[40, 30\\], its image a height and width of \\[30, 40\\]"),
])
def test_outlines_that_are_none(tmp_path: Path, outline: Any, message: str) -> None:
    described = content() | {"annotations": [an_object(3, 1, [1, 1, 5, 5], id=1, segmentation=outline)]}
    files = write(tmp_path, described)
    with pytest.raises(ValueError, match=message):
        CocoImages(*files, masks=True)
    assert len(CocoImages(*files)[1][1]["boxes"]) == 1


def test_collate() -> None:
    assert collate([None, None]) is None
    images, targets = collate([(torch.zeros(3, 2, 2), {"a": 1}), None, (torch.ones(3, 2, 2), {"a": 2})])
    assert images.shape == (2, 3, 2, 2)
    assert images[1].min() == 1
    assert targets == [{"a": 1}, {"a": 2}]


def test_pickle_and_memory(tmp_path: Path) -> None:
    described = content()
    described["images"] = [{"id": i, "file_name": f"{i:012}.png", "width": 40, "height": 30} for i in range(2000)]
    described["annotations"] = [an_object(i % 2000, 1, [1, 1, 5, 5], id=i, segmentation=[[0.5] * 100])
                                for i in range(14000)]
    folder, file = tmp_path / "images", tmp_path / "a.json"
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(folder / f"{1999:012}.png")
    file.write_text(json.dumps(described))
    assert "segmentation" not in _read_json(str(file))["annotations"][7]
    data = CocoImages(folder, file)
    stored = pickle.dumps(data)
    assert len(stored) < 14000 * 60 + 2000 * 60
    assert pickle.loads(stored)[1999][1]["boxes"].tolist() == [[1, 1, 6, 6]] * 7
    assert pickle.loads(stored)._name(3) == f"{3:012}.png"


# ------------------------------------------------------------------------------------------------------- bad input


def broken(**changes: Any) -> dict[str, Any]:
    return content() | changes


def with_entry(kind: str, index: int, **changes: Any) -> dict[str, Any]:
    """Some fields of one entry changed; ... takes a field away."""
    data = content()
    entry = data[kind][index] | changes
    data[kind][index] = {key: value for key, value in entry.items() if value is not ...}
    return data


@pytest.mark.parametrize(("data", "message"), [
    ("", "no json file, or cut short"),
    (json.dumps(content())[:-30], "no json file, or cut short"),
    ("[1, 2]", "no list of images and annotations and categories"),
    ({"images": [], "captions": {}}, "no list of annotations and categories"),
    (broken(annotations={}), "no list of annotations"),
    (broken(images=[]), "lists no image"),
    (broken(annotations=[3]), r"image_id of annotations\[0\] must be an integer, found 3"),
    (with_entry("images", 1, id=7), "image id 7 is listed more than once"),
    (with_entry("images", 1, file_name="first.png"), "image file 'first.png' is listed more than once"),
    (with_entry("categories", 2, id=1), "category id 1 is listed more than once"),
    (with_entry("images", 2, width=...), r"width of images\[2\] must be a positive integer, found None"),
    (with_entry("images", 2, height=0), r"height of images\[2\] must be a positive integer, found 0"),
    (with_entry("images", 0, id="7"), r"id of images\[0\] must be an integer, found '7'"),
    (with_entry("categories", 0, name=...), r"name of categories\[0\] must be a text"),
    (with_entry("annotations", 4, image_id=8), r"annotations of an unlisted image, id 8 \(1 in all\)"),
    (with_entry("annotations", 4, category_id=2), r"annotations of an unlisted category, id 2 \(1 in all\)"),
    (with_entry("annotations", 5, bbox=...), r"bbox of annotations\[5\] must be four finite numbers"),
    (with_entry("annotations", 5, bbox=[1, 2, 3]), r"bbox of annotations\[5\] must be four finite numbers"),
    (with_entry("annotations", 5, bbox=[1, 2, 3, float("nan")]), r"bbox of annotations\[5\] must be four finite"),
    (with_entry("annotations", 5, bbox=[10**400, 2, 3, 4]), r"bbox of annotations\[5\] must be four finite"),
    (with_entry("annotations", 5, area=1e308), r"area of annotations\[5\] must be a finite number"),
    (with_entry("images", 1, file_name="./first.png"), "image file 'first.png' is listed more than once"),
    (with_entry("images", 2, width=40.5), r"width of images\[2\] must be a positive integer, found 40.5"),
    (broken(categories=[], annotations=[]), "lists no category"),
    ("[" * 100_000, "no json file"),
    (with_entry("annotations", 5, iscrowd=2), r"iscrowd of annotations\[5\] must be 0 or 1, found 2"),
])
def test_what_is_no_coco_file(tmp_path: Path, data: Any, message: str) -> None:
    folder, file = write(tmp_path, content())
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=message):
        CocoImages(folder, file)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder, file = write(tmp_path, content())
    file.write_bytes(b"\xff\xd8\xff\xe0" * 9)
    with pytest.raises(ValueError, match="no json file"):
        CocoImages(folder, file)


def test_wrong_places(tmp_path: Path) -> None:
    folder, file = write(tmp_path, content())
    with pytest.raises(ValueError, match=r"no annotations in .*nowhere.json: No such file"):
        CocoImages(folder, tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"none of the 3 images .* the first would be .*first.png"):
        CocoImages(tmp_path, file)


def test_no_annotation_at_all(tmp_path: Path) -> None:
    data = CocoImages(*write(tmp_path, broken(annotations=[])))
    assert data.notes == []
    assert [len(target["labels"]) for _, target in data] == [0, 0, 0]
    assert data.ground_truth()["annotations"] == []


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("file", "folder", "split"), [
    ("annotations/instances_val2017.json", "val2017", "val"),
    ("annotations/instances_val2017.json", "val2017", "val2017"),
    ("annotations/instances_val2017.json", "images/val2017", "val"),
    ("annotations/instances_mine.json", "images/mine", "mine"),
    ("annotations/instances_mine.json", "mine", "mine"),
    ("instances_val.json", "images/val", "validation"),
    ("valid/_annotations.coco.json", "valid", "val"),
])
def test_layouts(tmp_path: Path, file: str, folder: str, split: str) -> None:
    for part in ((tmp_path / file).parent, tmp_path / folder):
        part.mkdir(parents=True, exist_ok=True)
    pictures, annotations = write(tmp_path, content())
    for picture in pictures.iterdir():
        if picture.is_file():
            picture.rename(tmp_path / folder / picture.name)
    annotations.rename(tmp_path / file)
    data = open_coco(tmp_path, split, transform=lambda image, target: target["image_id"].item())
    assert [data[i] for i in range(3)] == [7, 3, 5]
    with pytest.raises(ValueError, match=r"has no COCO split 'test'. Looked for annotations/instances_test2017.json "
                                         r"with images in test2017; .*test/_annotations.coco.json"):
        open_coco(tmp_path, "test")


def test_annotations_without_their_folder(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(ValueError, match=r"val2017.json is there, but no folder .*/val2017, .*/images/val2017"):
        open_coco(tmp_path, "val")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        open_coco(tmp_path / "nothing", "train")


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no images at {COCO_MINI} (set ADN_COCO_MINI)")
def test_coco_mini() -> None:
    train, val = open_coco(COCO_MINI, "train"), open_coco(COCO_MINI, "val")
    assert (len(train), len(val), len(train.class_names), train.notes, val.notes) == (70, 68, 80, [], [])
    assert train.categories == val.categories
    assert train.categories[-1] == Category(90, "toothbrush")
    truth = train.ground_truth()["annotations"]
    assert (len(truth), sum(a["iscrowd"] for a in truth)) == (586, 6)
    assert sum(len(target["labels"]) for _, target in train) == 580
