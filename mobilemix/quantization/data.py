"""Samples to calibrate on and to evaluate with: the shipped photographs, folders of images, arrays, iterables.

Whatever they come from, samples are what the model takes: normalised, float32 where the model is, one at a time. Files
in a folder that are no image, or a broken one, are skipped and counted; an array that does not fit is an error.
"""

import dataclasses
import itertools
import os
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilemix import assets
from mobilemix.errors import InputError, first_line
from mobilemix.preprocess import Preprocess
from mobilemix.progress import counting
from mobilemix.quantization.options import BUILTIN, Quantization
from mobilemix.signature import Input, inputs_of
from mobilemix.targets.base import Array, Inputs, Lowered
from mobilemix.threads import spread

GIVEN = "(given in Python)"
"""`Quantization.data` of samples that were passed to `mobilemix.export`: no recipe can name these."""

SAMPLES = 128
"""Taken of the user's data where no number is given."""

DIMMED = 0.7
"""Contrast of the faint copy of each shipped photograph, of values after normalisation."""

LABELS = "labels"
"""Array of an .npz file that holds a class index for each sample."""

CHUNK = 32
"""Samples that are read, and evaluated, at a time."""

NAMED = 3
"""Skipped files that the note on standard error names."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a model takes.

    Attributes:
        inputs: names, shapes and dtypes for one sample; complex ones are float32 with [re, im] as the last axis.
        batched: names of those whose first axis is the batch; the others are shared by the samples of a batch.
        size: samples in a batch.
        preprocess: how an image file becomes the only input; None where it is no image.
        complex_names: of inputs that the source takes complex.
    """

    inputs: tuple[Input, ...]
    batched: frozenset[str]
    size: int = 1
    preprocess: Preprocess | None = None
    complex_names: frozenset[str] = frozenset()

    def batches(self, samples: Sequence[Inputs]) -> list[Inputs]:
        """Samples as the model takes them; the last batch is filled up from the first sample on."""
        if self.size == 1:
            return list(samples)
        starts = range(0, len(samples), self.size)
        groups = [[samples[(start + index) % len(samples)] for index in range(self.size)] for start in starts]
        return [self.stack(group) for group in groups]

    def stack(self, samples: Sequence[Inputs]) -> Inputs:
        """Samples as one batch of so many."""
        return {
            name: np.concatenate([sample[name] for sample in samples]) if name in self.batched else value
            for name, value in samples[0].items()
        }


def form_of(lowered: Lowered) -> Form:
    """What a lowered program takes, one sample at a time where its batch is left open."""
    inputs = inputs_of(lowered.program)
    preprocess = None
    if lowered.mean is not None and lowered.std is not None and len(inputs) == 1 and len(inputs[0].shape) == 4:
        preprocess = Preprocess(*inputs[0].shape[2:], lowered.mean, lowered.std, lowered.crop_pct)
    if lowered.larger is None:
        form = fixed_form(inputs, preprocess)
    else:
        pairs = zip(inputs, inputs_of(lowered.larger), strict=True)
        form = open_form(inputs, {one.name for one, other in pairs if one.shape != other.shape}, preprocess)
    return dataclasses.replace(form, complex_names=lowered.complex_names)


def fixed_form(inputs: Sequence[Input], preprocess: Preprocess | None) -> Form:
    """The form of a model for fixed shapes: of 1 sample, of a batch of images, or else of its inputs as they are."""
    first = inputs[0].shape[:1]
    if first != (1,) and preprocess is None:
        return Form(tuple(inputs), frozenset())
    batched = {each.name for each in inputs if each.shape[:1] == first}
    return open_form(inputs, batched, preprocess, size=first[0])


def open_form(inputs: Sequence[Input], batched: Collection[str], preprocess: Preprocess | None, size: int = 1) -> Form:
    """The form of a model of which it is known which inputs have a batch, in batches of `size`."""
    single = (
        dataclasses.replace(each, shape=(1, *each.shape[1:])) if each.name in batched else each for each in inputs
    )
    return Form(tuple(single), frozenset(batched), size, preprocess)


def calibration(lowered: Lowered, options: Quantization) -> list[Inputs]:
    """The inputs that a model is calibrated on, in the shapes that it takes; the same ones every time.

    Of more samples than are wanted, a seeded choice is spread over all of them: over the sorted files of a folder, and
    so over its subfolders.

    Raises:
        InputError: data that is missing, of another form than the model's inputs, or without a single sample.
    """
    form = form_of(lowered)
    if options.data == GIVEN:
        if not lowered.calibration:
            raise InputError("the model was calibrated on samples given in Python; give them again, or --calibration")
        return form.batches(lowered.calibration[: options.samples])
    dataset = _photographs(form) if options.data == BUILTIN else open_dataset(Path(options.data), form)
    wanted = min(options.samples or (dataset.size if options.data == BUILTIN else SAMPLES), dataset.size)
    samples: list[Inputs] = []
    with counting("calibration sample", wanted) as step:
        for chunk in dataset.read(wanted, options.seed):
            for _, sample in chunk:
                samples.append(sample)
                step(1)
    return form.batches(samples)


def take(items: Iterable[Any], form: Form, wanted: int) -> tuple[Inputs, ...]:
    """Samples from Python: at most `wanted` of an iterable, which may be endless.

    Args:
        items: arrays for a model of one input, or dicts by input name; with or without an axis of several samples in
            front. Dtypes and shapes are those of `open_dataset`.
        form: what the model takes.
        wanted: number of samples.

    Raises:
        InputError: an item that does not fit, or no item.
    """
    found: list[Inputs] = []
    for number, item in enumerate(items):
        what = f"item {number} of the calibration data"
        arrays = item if isinstance(item, Mapping) else {form.inputs[0].name: item}
        try:
            columns = {str(name): _with_samples(np.asarray(value), form, str(name)) for name, value in arrays.items()}
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU, or with a gradient
            raise InputError(f"{what} is no array: {first_line(error)}") from error
        rows = _Arrays(columns, form, what)
        found += [rows.load(index) for index in range(min(rows.size, wanted - len(found)))]
        if len(found) == wanted:
            break
    if not found:
        raise InputError("the calibration data has no sample; give arrays, or dicts of arrays by input name")
    return tuple(found)


@dataclasses.dataclass
class Dataset:
    """Samples that are read when they are wanted.

    Attributes:
        size: how many there may be.
        load: sample of a number below `size`; raises InputError.
        files: of which each is one, and may be unreadable; empty where the samples are rows of arrays.
        labels: class index of each, (size,); None where the arrays have none.
        skipped: files that were unreadable so far, with the reason.
    """

    size: int
    load: Callable[[int], Inputs]
    files: Sequence[Path] = ()
    labels: Array | None = None
    skipped: dict[Path, str] = dataclasses.field(default_factory=dict)

    def read(self, wanted: int | None = None, seed: int = 0) -> Iterator[list[tuple[int, Inputs]]]:
        """(number, sample) in chunks, in a mixed order, until there are `wanted` or no more; reports what was skipped.

        Raises:
            InputError: not a single sample can be read.
        """
        wanted = self.size if wanted is None else min(wanted, self.size)
        order = _order(self.size, wanted, seed)
        tried = found = 0
        while found < wanted and tried < self.size:
            numbers = order[tried : tried + min(CHUNK, wanted - found)]
            tried += len(numbers)
            loaded = list(zip(numbers, spread(self._attempt, numbers), strict=True))
            self.skipped |= {self.files[number]: sample for number, sample in loaded if isinstance(sample, str)}
            chunk = [(number, sample) for number, sample in loaded if not isinstance(sample, str)]
            found += len(chunk)
            if chunk:
                yield chunk
        self._report(tried)
        if not found:
            raise InputError("none of the files is an image that can be read")

    def _attempt(self, number: int) -> Inputs | str:
        """The sample, or why its file is skipped."""
        try:
            return self.load(number)
        except InputError as error:
            if not self.files:
                raise
            return str(error)

    def _report(self, tried: int) -> None:
        if not self.skipped:
            return
        some = itertools.islice(self.skipped.items(), NAMED)
        named = [f"{path.name} ({reason.rpartition(f'{path}: ')[2]})" for path, reason in some]
        more = ", …" if len(self.skipped) > NAMED else ""
        verb = "was" if len(self.skipped) == 1 else "were"
        sys.stderr.write(f"note: {len(self.skipped)} of {tried} files {verb} skipped: {', '.join(named)}{more}\n")


def open_dataset(path: Path, form: Form) -> Dataset:
    """Samples in a folder of images, an .npy or an .npz file.

    - Folder: searched with its subfolders; every file that is not hidden may be an image.
    - .npy: of a model with one input. An image's is uint8 pixels, (N, C, H, W) or (N, H, W, C), which are normalised as
      the model's images are, or floats, (N, C, H, W), which are taken to be normalised already. Other inputs have the
      shape and kind of dtype of the model's, with N samples in front, with or without its batch of 1.
    - .npz: one such array for each input, by its name; `labels`, (N,), are class indices, and optional.

    Raises:
        InputError: the file is missing or unreadable, or does not fit the model.
    """
    if path.is_dir():
        return _images(path, form)
    if not path.exists():
        raise InputError(f"there is no data {path}; give a folder of images, an .npy or an .npz file")
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path} is neither a folder of images nor an .npy or .npz file")
    try:
        content = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        columns = {form.inputs[0].name: content} if path.suffix == ".npy" else dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"cannot read {path} as an array of numbers: {error}") from error
    labels = None
    if LABELS not in {each.name for each in form.inputs}:
        labels = columns.pop(LABELS, None)
    rows = _Arrays(columns, form, str(path))
    if labels is not None and (labels.shape != (rows.size,) or labels.dtype.kind not in "iu"):
        raise InputError(f"{path}: {LABELS} is {labels.dtype} {labels.shape}; wanted: integers ({rows.size},)")
    return Dataset(rows.size, rows.load, labels=labels)


def _photographs(form: Form) -> Dataset:
    """The shipped photographs, and each mirrored, upside down and with less contrast."""
    preprocess = form.preprocess
    if preprocess is None:
        raise InputError(
            "8-bit values are calibrated on photographs, and the model's input is no image; give its own data with "
            "--calibration FILE.npz, or use --precision fp16"
        )
    views: tuple[Callable[[Array], Array], ...] = (
        lambda image: image,
        lambda image: image[..., ::-1],
        lambda image: image[:, :, ::-1],
        lambda image: image * np.float32(DIMMED),
    )
    shown = list(itertools.product(assets.photographs(), views))

    def load(index: int) -> Inputs:
        path, view = shown[index]
        return {form.inputs[0].name: np.ascontiguousarray(view(preprocess(path)))}

    return Dataset(len(shown), load)


def _images(folder: Path, form: Form) -> Dataset:
    if form.preprocess is None:
        raise InputError(
            f"{folder} is a folder of images, and the model's input is none; give an .npz file with an array for each"
            f" input: {', '.join(each.name for each in form.inputs)}"
        )
    preprocess, name = form.preprocess, form.inputs[0].name
    files = _files(folder)
    if not files:
        raise InputError(f"there is no image in the folder {folder}")
    return Dataset(len(files), lambda index: {name: preprocess(files[index])}, files)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder that is not hidden, sorted; links to folders are followed, but not in circles."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def _order(size: int, wanted: int, seed: int) -> list[int]:
    """All of `size` numbers, such that the first `wanted`, and the next, are one of each of as many equal parts."""
    if seed < 0:
        raise InputError(f"seed must be at least 0, not {seed}")
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = [generator.permutation(part) for part in np.array_split(np.arange(size), wanted)]
    mixed = [parts[index] for index in generator.permutation(len(parts))]
    rounds = itertools.zip_longest(*mixed)
    return [int(number) for each in rounds for number in each if number is not None]


class _Arrays:
    """Samples as rows of arrays, one array for each input."""

    def __init__(self, columns: Mapping[str, Array], form: Form, where: str) -> None:
        names = [each.name for each in form.inputs]
        if columns.keys() != set(names):
            given = ", ".join(columns) or "nothing"
            raise InputError(f"{where} has arrays for {given}; the model takes {', '.join(names)}")
        self._columns = {each.name: _column(columns[each.name], each, form, where) for each in form.inputs}
        self._form, self._where = form, where
        sizes = {name: len(column) for name, column in self._columns.items()}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{size} of {name}" for name, size in sizes.items())
            raise InputError(f"{where} has {counts}; every input needs as many samples")
        self.size = next(iter(sizes.values()))
        if not self.size:
            raise InputError(f"{where} has no sample")

    def load(self, index: int) -> Inputs:
        """The sample in one row."""
        return {each.name: self._value(each, self._columns[each.name][index], index) for each in self._form.inputs}

    def _value(self, each: Input, row: Array, index: int) -> Array:
        if self._form.preprocess is not None and row.dtype == np.uint8:
            return self._form.preprocess.normalise(row.reshape(each.shape[1:]).transpose(1, 2, 0))
        value = np.array(row, dtype=each.dtype).reshape(each.shape)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{self._where}: sample {index} of {each.name} has values that are not finite")
        return value


def _column(array: Array, each: Input, form: Form, where: str) -> Array:
    """The array of an input, (N, …) with the axes of one sample as the model has them."""
    item = _item(each, form)
    last = (*item[1:], *item[:1])  # channels last, as image files have them
    pixels = form.preprocess is not None and array.dtype == np.uint8
    if array.dtype.kind == "c" and each.name in form.complex_names:
        array = np.stack([array.real, array.imag], axis=-1)
    if pixels and array.shape[1:] == last != item:
        array = np.moveaxis(array, -1, 1)
    kinds = "u" if pixels else _KINDS[np.dtype(each.dtype).kind]
    if array.ndim and array.shape[1:] in (item, (1, *item)) and array.dtype.kind in kinds:
        return array
    wanted = f"{each.dtype} {_sizes(item)}"
    if form.preprocess is not None:
        wanted = f"uint8 pixels {_sizes(item)} or {_sizes(last)}, or normalised {each.dtype} {_sizes(item)}"
    raise InputError(f"{where}: {each.name} is {array.dtype} {array.shape}; wanted: {wanted}")


_KINDS = {"f": "f", "i": "iu", "b": "b"}
"""Kinds of dtypes that are taken for an input of one kind."""


def _item(each: Input, form: Form) -> tuple[int, ...]:
    """Shape of one sample, without its batch of 1."""
    return each.shape[1:] if each.name in form.batched else each.shape


def _sizes(item: Sequence[int]) -> str:
    return f"(N, {', '.join(map(str, item))})" if item else "(N,)"


def _with_samples(value: Array, form: Form, name: str) -> Array:
    """An array with an axis of samples in front, which one sample alone lacks."""
    ranks = {len(_item(each, form)) - (value.dtype.kind == "c") for each in form.inputs if each.name == name}
    return value[np.newaxis] if value.ndim in ranks else value
