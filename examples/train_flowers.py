"""Trains one of the shipped models from scratch on a folder of images, on a laptop's CPU or on a GPU.

The folder holds ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``. The checkpoint that mobilemix ships, an AFFNet-ET, was
made with

    python examples/train_flowers.py --data flowers --minutes 106 --out run

but for its first 15 epochs, whose settings differed, and for sizes in steps of 16; mobilemix/assets/README.md tells
how.

A training that has a time budget spends it whole: progress, and with it the learning rate and the image size, follows
the clock, so that a busy machine gets fewer epochs and still a complete schedule. ``--epochs`` counts epochs instead,
which makes a run reproducible from its seed. Either can be continued with ``--resume``.

Three habits make a small network learn from a few thousand pictures: images grow during training, from 0.6 to 1.0 of
the final size, and are tested larger still (Touvron et al., "Fixing the train-test resolution discrepancy",
arXiv 1906.06423); nearly half of the training images are mixtures of two (CutMix, arXiv 1905.04899, and mixup,
arXiv 1710.09412); and the weights that count are an exponential moving average. Validation accuracy is logged on the
way but selects nothing: the last average is what is saved.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilemix.models import registry
from mobilemix.preprocess import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_PCT = 0.95  # share of the resized image's side that evaluation keeps
CACHE_SIDE = 224  # pixels; short side of the decoded training images

GROWTH = ((0.0, 0.6), (0.45, 0.8), (0.8, 1.0))  # from this progress on, this share of the final size
SIZE_STEP = 32  # the networks' stride
MIXING_ENDS = 0.8  # progress; the last epochs see single images, as evaluation does
WARM_UP = 0.03  # of the schedule
CROP_AREA, CROP_ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
ROTATION_DEGREES, ROTATION_SHARE = 30.0, 0.5
JITTER = 0.4  # brightness, contrast and saturation, each by a factor in 1 ± JITTER
ERASED_SHARE, ERASED_AREA = 0.25, (0.02, 0.2)
CUTMIX_SHARE, MIXUP_SHARE = 0.3, 0.15
MIXUP_ALPHA = 0.4
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
GRADIENT_NORM = 5.0
EMA_DECAY = 0.998
EVALUATION_BATCH = 64
BF16_DEVICES = ("cpu", "cuda")
HALF_TOLERANCE = 0.02  # largest change of a logit, relative to the largest logit, for which float16 weights are saved


@dataclass(frozen=True)
class Split:
    """Image files, their class indices, and the class names."""

    files: list[Path]
    labels: Tensor
    classes: list[str]


def list_split(folder: Path) -> Split:
    """Every file of ``folder/CLASS/``, classes in alphabetical order."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    return Split([path for path, _ in files], torch.tensor([label for _, label in files]), classes)


def decode(path: Path) -> Image.Image:
    """The image in RGB, shrunk where its short side exceeds CACHE_SIDE."""
    image = Image.open(path).convert("RGB")
    scale = CACHE_SIDE / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)


def to_tensor(images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Equally large RGB images to (B, 3, H, W) float32 in [0, 1]."""
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return batch.to(device).permute(0, 3, 1, 2).float() / 255


def normalise(x: Tensor) -> Tensor:
    """[0, 1] RGB to zero mean and unit variance per channel."""
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random part of `image`, resized to a square of `size` pixels."""
    width, height = image.size
    area = width * height * rng.uniform(*CROP_AREA)
    aspect = math.exp(rng.uniform(*map(math.log, CROP_ASPECT)))
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def augment(x: Tensor) -> Tensor:
    """Flips, rotates, jitters the colours and erases a rectangle of each image of (B, 3, S, S) in [0, 1]."""
    batch = x.shape[0]
    flip = torch.where(_chance(x, 0.5), -1.0, 1.0)
    angle = torch.where(_chance(x, ROTATION_SHARE), _uniform(x, -1, 1) * math.radians(ROTATION_DEGREES), 0.0)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([flip * cos, -sin, zero, flip * sin, cos, zero], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    brightness, contrast, saturation = (_uniform(x, 1 - JITTER, 1 + JITTER).view(-1, 1, 1, 1) for _ in range(3))
    x = x * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation).clamp(0, 1)

    erased = _boxes(x, _uniform(x, *ERASED_AREA)) & _chance(x, ERASED_SHARE).view(-1, 1, 1, 1)
    return torch.where(erased, torch.rand_like(x), x)


def mix(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each image (B, 3, S, S) and target (B, classes) with another of the batch, if at all."""
    kind = torch.rand(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    lam = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample((x.shape[0], 1, 1, 1)).to(x.device)
    kept = torch.ones_like(x[:, :1])
    kept = torch.where(kind < CUTMIX_SHARE + MIXUP_SHARE, lam, kept)
    kept = torch.where(kind < CUTMIX_SHARE, (~_boxes(x, _uniform(x, 0, 1))).float(), kept)
    share = kept.mean((1, 2, 3)).unsqueeze(1)
    other = torch.randperm(x.shape[0], device=x.device)
    return x * kept + x[other] * (1 - kept), target * share + target[other] * (1 - share)


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(like.shape[0], device=like.device).uniform_(low, high)


def _chance(like: Tensor, probability: float) -> Tensor:
    return torch.rand(like.shape[0], device=like.device) < probability


def _boxes(like: Tensor, area: Tensor) -> Tensor:
    """One random rectangle per image as a mask (B, 1, S, S); `area` (B,) is its share of the image before clipping."""
    size = like.shape[-1]
    aspect = torch.exp(_uniform(like, -0.7, 0.7))
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()]) * size
    centres = torch.rand(2, like.shape[0], device=like.device) * size
    positions = torch.arange(size, device=like.device) + 0.5
    inside = (positions - centres.unsqueeze(-1)).abs() < sides.unsqueeze(-1) / 2  # (2, B, S): rows, columns
    return (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).unsqueeze(1)


class Average:
    """Exponential moving average of a model's parameters and buffers, faster while training is young."""

    def __init__(self, model: nn.Module) -> None:
        """Starts at the model's present state."""
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.updates = 0

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continues from an earlier average of `updates` updates."""
        self.updates = updates
        for name, tensor in state.items():
            self.state[name].copy_(tensor)

    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's state."""
        self.updates += 1
        decay = min(EMA_DECAY, (1 + self.updates) / (10 + self.updates))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)


class Schedule:
    """Progress from 0 to 1 through a budget of epochs or of minutes, and what follows from it."""

    def __init__(self, epochs: int | None, minutes: float | None, steps_per_epoch: int) -> None:
        """Exactly one of `epochs` and `minutes` is the budget."""
        self.budget = minutes * 60 if minutes is not None else float((epochs or 0) * steps_per_epoch)
        self.timed = minutes is not None
        self.steps = 0
        self.seconds = 0.0  # of training proper, over all resumptions

    def advance(self, seconds: float) -> None:
        """Counts one step that took `seconds`."""
        self.steps += 1
        self.seconds += seconds

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 1 when training is over."""
        return min(1.0, (self.seconds if self.timed else self.steps) / self.budget)

    @property
    def rate(self) -> float:
        """Learning rate relative to its peak: linear warm-up, then half a cosine down to 0."""
        if self.progress < WARM_UP:
            return max(self.progress / WARM_UP, 0.01)
        return 0.5 * (1 + math.cos(math.pi * (self.progress - WARM_UP) / (1 - WARM_UP)))

    def size(self, final: int) -> int:
        """Image size now, in pixels: a multiple of the networks' stride, `final` in the end."""
        share = next(share for start, share in reversed(GROWTH) if self.progress >= start)
        return max(SIZE_STEP, round(share * final / SIZE_STEP) * SIZE_STEP) if share < 1 else final


def batches(
    images: Sequence[Image.Image], labels: Tensor, batch_size: int, size: int, device: torch.device, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of randomly cropped images (B, 3, size, size) in [0, 1] and class indices, whole batches only."""
    order = rng.sample(range(len(images)), len(images))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        crops = [random_crop(images[index], size, rng) for index in chosen]
        yield to_tensor(crops, device), labels[chosen].to(device)


@torch.no_grad()
def predict(name: str, state: Mapping[str, Tensor], split: Split, size: int, device: torch.device) -> Tensor:
    """Float32 logits (N, classes) of every image of `split`, by the model called `name` with the weights `state`."""
    model = registry.create_model(name, num_classes=len(split.classes)).to(device).eval()
    model.load_state_dict(state)
    preprocess = Preprocess(size, size, MEAN, STD, CROP_PCT)
    views = torch.from_numpy(np.concatenate([preprocess(path) for path in split.files]))
    starts = range(0, len(views), EVALUATION_BATCH)
    return torch.cat([model(views[start : start + EVALUATION_BATCH].to(device)).cpu() for start in starts])


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


class Trainer:
    """The model being trained and everything that has to survive an interruption."""

    def __init__(self, classes: int, schedule: Schedule, options: argparse.Namespace, device: torch.device) -> None:
        """Starts a new training, seeded by the options."""
        torch.manual_seed(options.seed)
        self.classes, self.schedule, self.peak_rate = classes, schedule, options.lr
        self.rng = random.Random(options.seed)  # noqa: S311
        self.epoch = 0
        self.model = registry.create_model(options.model, num_classes=classes).to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = Average(self.model)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]  # biases and norms
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=options.lr)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One update on a batch of (B, 3, S, S) in [0, 1] and class indices; returns its loss."""
        images, target = augment(images), F.one_hot(labels, self.classes).float()
        if self.schedule.progress < MIXING_ENDS:
            images, target = mix(images, target)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type in BF16_DEVICES):
            answer = self.model(normalise(images))
        heads = answer if isinstance(answer, tuple) else (answer,)  # a second one is for distillation
        losses = [F.cross_entropy(logits.float(), target, label_smoothing=LABEL_SMOOTHING) for logits in heads]
        loss = torch.stack(losses).mean()
        self.adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        for group in self.adamw.param_groups:
            group["lr"] = self.peak_rate * self.schedule.rate
        self.adamw.step()
        self.average.update(self.model)
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes what `restore` needs, and replaces the old file only when the new one is whole."""
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimiser": self.adamw.state_dict(),
            "average": self.average.state,
            "updates": self.average.updates,
            "steps": self.schedule.steps,
            "seconds": self.schedule.seconds,
            "torch_random": torch.get_rng_state(),
            "crop_random": self.rng.getstate(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Continues from a file of `save`."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["optimiser"])
        self.average.load(state["average"], state["updates"])
        self.schedule.steps, self.schedule.seconds = state["steps"], state["seconds"]
        torch.set_rng_state(state["torch_random"])
        self.rng.setstate(state["crop_random"])


def train(options: argparse.Namespace, console: Console) -> None:
    """Trains, and leaves ``model.safetensors``, ``epochs.jsonl`` and ``checkpoint.pt`` in the output folder."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(name)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = options.out / "checkpoint.pt", options.out / "epochs.jsonl"

    training, validation = list_split(options.data / "train"), list_split(options.data / "val")
    if training.classes != validation.classes:
        raise SystemExit("train and val hold different classes; they need folders of the same names")
    images = [decode(path) for path in training.files]
    console.print(f"{len(images)} training and {len(validation.files)} validation images on {device}")

    schedule = Schedule(options.epochs, options.minutes, len(images) // options.batch_size)
    trainer = Trainer(len(training.classes), schedule, options, device)
    if options.resume:
        trainer.restore(checkpoint)
        console.print(f"resumed after epoch {trainer.epoch}, {schedule.progress:.0%} done")

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0)
        while schedule.progress < 1:
            trainer.epoch += 1
            size, losses, began = schedule.size(options.size), [], time.monotonic()
            trainer.model.train()
            tick = began
            for batch, labels in batches(images, training.labels, options.batch_size, size, device, trainer.rng):
                losses.append(trainer.step(batch, labels))
                now = time.monotonic()
                schedule.advance(now - tick)
                tick = now
                bar.update(task, completed=schedule.progress, description=f"epoch {trainer.epoch}, {size} px")
                if schedule.progress >= 1:
                    break
            record: dict[str, float] = {
                "epoch": trainer.epoch,
                "progress": round(schedule.progress, 4),
                "size": size,
                "loss": round(sum(losses) / len(losses), 4),
                "seconds": round(time.monotonic() - began, 1),
            }
            if trainer.epoch % options.check_every == 0 or schedule.progress >= 1:
                logits = predict(options.model, trainer.average.state, validation, options.size, device)
                record["val_top1"] = round(top1(logits, validation.labels), 4)
                trainer.save(checkpoint)
            with log.open("a") as file:
                print(json.dumps(record), file=file)
            console.print(json.dumps(record), highlight=False, soft_wrap=True)

    finish(trainer.average.state, validation, options, device, console)


def finish(
    state: Mapping[str, Tensor], validation: Split, options: argparse.Namespace, device: torch.device, console: Console
) -> None:
    """Evaluates the averaged weights and saves them, in float16 where that changes no logit noticeably."""
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    predictions = (predict(options.model, each, validation, options.eval_size, device) for each in (state, half))
    logits, half_logits = predictions
    change = ((half_logits - logits).abs().max() / logits.abs().max()).item()
    saved, kept = (half, half_logits) if change < HALF_TOLERANCE else (state, logits)
    accuracy = top1(kept, validation.labels)
    metadata = {
        "model": options.model,
        "classes": ",".join(validation.classes),
        "input_size": str(options.eval_size),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "crop_pct": str(CROP_PCT),
        "val_top1": f"{accuracy:.4f}",
        "val_images": str(len(validation.files)),
    }
    path = options.out / "model.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in saved.items()}, path, metadata)
    dtype = "float16" if saved is half else "float32"
    console.print(f"{path}: {dtype}, top-1 {accuracy:.2%} at {options.eval_size} px")
    console.print(f"float16 weights change a logit by at most {change:.2%} of the largest")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a model from scratch on a folder of images.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--out", type=Path, default=Path("run"), help="where checkpoint, log and weights go")
    parser.add_argument("--model", default="affnet_et", choices=registry.list_models(), help="a name of the registry")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--epochs", type=int, help="budget in passes over the training images")
    budget.add_argument("--minutes", type=float, help="budget in minutes of training; the schedule follows the clock")
    parser.add_argument("--size", type=int, default=128, help="final training image size in pixels")
    parser.add_argument("--eval-size", type=int, default=160, help="image size of the final evaluation in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--check-every", type=int, default=5, help="epochs between validations and checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    train(parse(arguments), Console())


if __name__ == "__main__":
    main()
