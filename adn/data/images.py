"""Images with labels: folders, tar files and everything else timm's dataset factory reads."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision.transforms import v2

IMAGENET_MEAN = timm.data.IMAGENET_DEFAULT_MEAN
IMAGENET_STD = timm.data.IMAGENET_DEFAULT_STD

# What a damaged or absent image raises: Pillow lets errors of its decoders and parsers through.
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, tarfile.TarError, Image.DecompressionBombError
)
_EVALUATION = ("validation", "val", "valid", "eval", "evaluation")
# Prefixes of timm's factory, and the packages it needs for them.
_FACTORY = {"torch": "torchvision", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets",
            "wds": "webdataset"}

# So many images are looked at when data are opened.
LOOKED_AT = 16

Transform = Callable[[Image.Image], Any]


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits. 16 bits are scaled, where Pillow's own conversion cuts off at 255.

    Raises:
        OSError: for numbers of which it is not known what is white (32-bit and floating ones).
    """
    if image.mode in ("I", "F") and not _has_16_bits(image):
        raise OSError(f"pixels are {'32-bit' if image.mode == 'I' else 'floating'} numbers of unknown range; convert "
                      "the image to 8 bits")
    if _has_16_bits(image):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def notes_of_range(files: Iterable[Callable[[], Image.Image]]) -> list[str]:
    """What to tell of 16-bit images that use a small part of their range, as cameras of 10 and 12 bits write them.

    One image may be dark; of `LOOKED_AT`, none of which reaches a sixteenth of white, it is said.
    """
    brightest = []
    for open_file in itertools.islice(files, LOOKED_AT):
        with contextlib.suppress(*UNREADABLE), open_file() as image:
            if _has_16_bits(image):
                brightest.append(int(np.asarray(image).max()))
    if not 0 < max(brightest, default=0) < 4096:
        return []
    bits = max(brightest).bit_length()
    return [f"the 16-bit images looked at ({len(brightest)}) have no number above {max(brightest)}: 65535 is taken for "
            f"white, so they are almost black. If they are of {max(bits, 8)} bits, multiply them by "
            f"{2 ** (16 - max(bits, 8))} before"]


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF data say it is to be shown."""
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which a copy does not keep
    return turned


class ImageData(Dataset):
    """Images that can be read in any order; items are `(transform(image), label)`, the label an int.

    An image that cannot be read or decoded gives None instead of an item, which `collate` drops, and is remembered.

    Attributes:
        class_names: name of every label; empty if the source does not say.
        transform: what turns an RGB `PIL.Image` into an item; None leaves the image as it is.
    """

    def __init__(self, source: Dataset, class_names: Sequence[str] = (), transform: Transform | None = None) -> None:
        self.source = source
        # timm's ImageDataset would put the next image in place of one it cannot read; its reader does not.
        self._reader = getattr(source, "reader", None)
        self.class_names = list(class_names)
        self.transform = transform
        # In shared memory: the processes of a DataLoader write here what the main process reads.
        self._failed = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        try:
            image, label = self._read(index)
        except UNREADABLE:
            self._failed[index] = True
            return None
        return image if self.transform is None else self.transform(image), int(label)

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, in any process of a DataLoader; each once."""
        return [self._name(index) for index in self._failed.nonzero().flatten().tolist()]

    @property
    def notes(self) -> list[str]:
        """What the user should know of the images, one sentence each; looks at some of each part of them."""
        if self._reader is None:
            return []
        step = max(1, len(self) // LOOKED_AT)
        return notes_of_range(functools.partial(self._open, index) for index in range(0, len(self), step))

    def _open(self, index: int) -> Image.Image:
        return Image.open(self._reader[index][0])

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            image, label = self.source[index]
            return to_rgb(image), label
        file, label, *_ = self._reader[index]
        with file, Image.open(file) as image:
            return to_rgb(image), label

    def _name(self, index: int) -> str:
        return f"image {index}" if self._reader is None else str(self._reader.filename(index, absolute=True))


class ImageStream(IterableDataset):
    """Images that can only be read in turn (`tfds/`, `hfids/`, `wds/`); items as those of `ImageData`.

    What cannot be decoded is up to the source: `wds/` leaves it out, the others raise.
    """

    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, source: IterableDataset, class_names: Sequence[str] = (), transform: Transform | None = None
                 ) -> None:
        self.source = source
        self.class_names = list(class_names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, label in self.source:
            yield image if self.transform is None else self.transform(image), int(label)


def open_dataset(
    root: str | os.PathLike,
    split: str = "",
    *,
    transform: Transform | None = None,
    class_map: str | dict[str, int] = "",
    need_classes: int = 1,
    training: bool = False,
    download: bool = False,
) -> ImageData | ImageStream:
    """Open labelled images.

    Args:
        root: a folder with one sub-folder per class, a `.tar` of one, or a data set of timm's factory by its prefix,
            with the folder it is (or is to be) stored in after a colon: `torch/cifar10:FOLDER`, `hfds/NAME`,
            `tfds/NAME:FOLDER`, `wds/NAME:FOLDER`.
        split: the sub-folder or split to open, e.g. "train"; "validation", "val" and "eval" find each other. "" = the
            folder itself, or the validation split of a named data set.
        transform: from an RGB `PIL.Image` to an item; see `eval_transform`.
        class_map: labels by class name, as a dict or a text file of one name per line; images of other classes are
            left out. "" = classes in natural order of their names.
        need_classes: raise if there are fewer.
        training: for data read in turn only: shuffle and repeat as timm does for training.
        download: fetch a named data set that is not there.

    Raises:
        ValueError: if there is nothing to open at `root`, no image in it, too few classes, or images that do not lie
            in one folder per class.
        ImportError: if the data set needs a package that is not installed.
    """
    root = os.fspath(root)
    prefix, _, rest = root.partition("/")
    prefix = prefix.lower()
    if prefix in _FACTORY and not os.path.exists(root):
        rest, _, folder = rest.partition(":")
        name, where, split = f"{prefix}/{rest}", folder or None, split or "validation"
        if prefix == "torch" and not folder:
            raise ValueError(f"{root!r} does not say where the images are; pass {root}:FOLDER")
        if prefix == "torch" and class_map:
            raise ValueError(f"a class map does not apply to {root!r}, whose labels are numbered already")
    else:
        name, where, split = "", _find_folder(root, split), ""
    try:
        source = timm.data.create_dataset(
            name, root=where, split=split, is_training=training, class_map=class_map, download=download
        )
    except ImportError as error:
        raise ImportError(f"{root} cannot be opened ({error}): pip install {_FACTORY[prefix]}") from error
    except (RuntimeError, AssertionError, ValueError, tarfile.TarError) as error:
        # Their kinds differ by source: an empty folder, an empty or broken archive, a name nobody knows.
        raise ValueError(f"no images to read in {root!r}: {error}") from error
    _check_folders(root, source)
    names = _class_names(source)
    if names and len(names) < need_classes:
        raise ValueError(f"{root!r} has {len(names)} class ({names[0]!r}), at least {need_classes} are needed: put the "
                         "images of each class into a sub-folder of its own")
    kind = ImageStream if isinstance(source, IterableDataset) else ImageData
    return kind(source, names, transform)


def collate(batch: list[tuple[torch.Tensor, int] | None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For a DataLoader: the readable items as a batch.

    Returns:
        Images (B, 3, H, W) and labels (B,) int64; None if no item was readable.
    """
    items = [item for item in batch if item is not None]
    return tuple(default_collate(items)) if items else None


def eval_transform(size: int, resize: int | None = None, interpolation: str = "bilinear",
                   mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> v2.Transform:
    """Shorter side to `resize`, crop of the centre, normalise: from a `PIL.Image` to (3, size, size) float32.

    Args:
        size: side of the crop, in pixels.
        resize: length of the shorter side before it; None = size / 0.875 (224 from 256).
        interpolation: "nearest", "bilinear" or "bicubic".
        mean, std: per channel, for values in [0, 1].
    """
    resize = round(size / 0.875) if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"a crop of {size} pixels from images of {resize}; pass 1 <= size <= resize")
    return v2.Compose([
        v2.Resize(resize, interpolation=v2.InterpolationMode(interpolation)),
        v2.CenterCrop(size),
        *_as_net_input(mean, std),
    ])


def train_transform(recipe: Any, config: dict[str, Any]) -> v2.Transform:
    """Random crop, flip, TrivialAugmentWide or RandAugment, normalise, erase: from a `PIL.Image` to (3, S, S) float32.

    Args:
        recipe: an `adn.train.Recipe`.
        config: size, interpolation, mean and std, as `data_config` gives them.
    """
    interpolation = v2.InterpolationMode(config["interpolation"])
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(config["size"], scale=(recipe.min_area, 1.0), interpolation=interpolation)]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip(recipe.flip))
    if recipe.augment == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=interpolation))
    elif recipe.augment == "rand":
        steps.append(v2.RandAugment(magnitude=recipe.magnitude, interpolation=interpolation))
    steps += _as_net_input(config["mean"], config["std"])
    if recipe.erase:
        steps.append(v2.RandomErasing(recipe.erase))
    return v2.Compose(steps)


def _as_net_input(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def data_config(net: nn.Module, stored: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """How to prepare images for a net: the arguments of `eval_transform`.

    Args:
        net: a model; timm's know their input size, mean and deviation.
        stored: settings that go before the model's own: what training stored in a checkpoint as `extra["data"]`.
        given: settings that go before both; None = not given.
    """
    config: dict[str, Any] = {"size": 224, "resize": None, "interpolation": "bilinear", "mean": IMAGENET_MEAN,
                              "std": IMAGENET_STD}
    known = getattr(net, "pretrained_cfg", None)
    if known:
        timm_config = timm.data.resolve_model_data_config(net)
        size = timm_config["input_size"][-1]
        config = {"size": size, "resize": int(size / timm_config["crop_pct"])} | {
            key: timm_config[key] for key in ("interpolation", "mean", "std")}
    config |= {key: value for key, value in (stored or {}).items() if key in config}
    given = {key: value for key, value in given.items() if value is not None}
    if "size" in given and "resize" not in given and given["size"] != config["size"]:
        config["resize"] = None
    return config | given


def _find_folder(root: str, split: str) -> str:
    if not os.path.exists(root):
        raise ValueError(f"{root!r} does not exist; pass a folder with one sub-folder of images per class, a .tar file "
                         f"of one, or a data set by name ({', '.join(f'{p}/...' for p in _FACTORY)})")
    if os.path.isfile(root) and not root.lower().endswith(".tar"):
        raise ValueError(f"{root!r} is a file; pass a folder with one sub-folder of images per class, or a .tar of one")
    if not split or os.path.isfile(root):
        return root
    for name in dict.fromkeys((split, *(_EVALUATION if split in _EVALUATION else ()))):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise ValueError(f"{root!r} has no folder {split!r}")


def _check_folders(root: str, source: Dataset) -> None:
    """timm labels an image by the innermost folder: refuse where that is not what was meant."""
    reader = getattr(source, "reader", None)
    if not isinstance(reader, ReaderImageFolder):
        return
    for index in range(len(reader)):
        name = reader.filename(index)
        folders = name.split(os.sep)[:-1]
        if not folders:
            raise ValueError(f"{name!r} in {root!r} has no class: images lie in one sub-folder per class; move it")
        if len(folders) > 1:
            hint = f" Open a part of it: --split {folders[0]}, or pass {os.path.join(root, folders[0])}." \
                if folders[0] in ("train", *_EVALUATION, "test") else ""
            raise ValueError(f"{name!r} in {root!r} lies too deep: images lie directly in one sub-folder per "
                             f"class.{hint}")


def _class_names(source: Dataset) -> list[str]:
    """The name of every label in 0..max; "" where a label has none."""
    for owner in (source, getattr(source, "reader", None)):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            labels = getattr(owner, attribute, None)
            if labels:
                names = [""] * (max(labels.values()) + 1)
                for name, label in labels.items():
                    names[label] = names[label] or str(name)
                return names
    return []
