"""Train the small vision transformer of the zoo on images of 32 x 32 pixels.

    python studies/vit_cifar10/train_vit.py --data parquet:DIR --minutes 60 --out vit.safetensors

The recipe is that of Wu 2025 as far as the minutes go: AdamW with learning rate 1e-3 and weight
decay 0.05, 10 % of warm-up, then cosine decay, label smoothing 0.1, stochastic depth 0.1, flips
and shifts. Its stronger augmentation, which needs 100 epochs, is there as --mix (CutMix or Mixup
of half of the batches), --auto (AutoAugment) and --erase. The schedule ends with the minutes, or
with --epochs. An interrupted training goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

import rankNAS
from rankNAS.data.base import Data
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.io.files import save_atomically, save_bytes
from rankNAS.search_spaces.zoo import build_model
from rankNAS.tasks import Classification, Layout

NORMALIZE = "imagenet"
LABELLED = Layout(inputs=(0,), target=1)
INPUT = "RGB/255 normalised by mean (0.485,0.456,0.406), std (0.229,0.224,0.225)"
CLASSES, RATE, DECAY, WARM_UP, SMOOTHING = 10, 1e-3, 0.05, 0.1, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="for example parquet:DIR")
    parser.add_argument("--out", type=Path, default=Path("vit.safetensors"))
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="of training, all runs together"
    )
    parser.add_argument("--epochs", type=float, default=100.0, help="at most")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="passes in bfloat16 (autocast)")
    parser.add_argument(
        "--mix", action="store_true", help="CutMix or Mixup of half of the batches"
    )
    parser.add_argument("--auto", action="store_true", help="AutoAugment, policy of CIFAR-10")
    parser.add_argument("--erase", action="store_true", help="random erasing, 0.25")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.data, normalize=NORMALIZE)
    training = Training(data, args)
    training.run()
    network = training.network.float().cpu().eval()
    assert data.test is not None
    accuracy = network_metrics(network, data.test, Classification(layout=LABELLED))["accuracy"]
    print(f"test accuracy {accuracy:.4f} after {training.epochs:.2f} epochs")
    metadata = {"model": "vit_cifar", "input": INPUT, "test_accuracy": f"{accuracy:.4f}"}
    save_bytes(args.out, save(network.state_dict(), metadata))


class Training:
    """The network, the optimiser and how far they are; kept in a file beside the output.

    Args:
        data: The data.
        args: The options of the command.
    """

    def __init__(self, data: Data, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.data, self.args = data, args
        self.network = build_model("vit_cifar", num_classes=CLASSES, input_shape=(3, 32, 32))
        self.network.to(args.device)
        matrices = [p for p in self.network.parameters() if p.dim() > 1]
        others = [p for p in self.network.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": DECAY}]
        groups.append({"params": others, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)
        self.step, self.seconds = 0, 0.0
        self.file = args.out.with_suffix(".checkpoint.pt")
        if self.file.exists():
            self._load()

    @property
    def epochs(self) -> float:
        """Passes over the training data so far."""
        return self.step * self.args.batch / len(self.data.train)

    @property
    def done(self) -> float:
        """The share of the schedule that is done."""
        return max(self.seconds / (60 * self.args.minutes), self.epochs / self.args.epochs)

    def run(self) -> None:
        """Train to the end of the schedule."""
        self.network.train()
        started, before, kept = time.perf_counter(), self.seconds, time.perf_counter()
        while self.done < 1:
            loss = self._train_step()
            self.step += 1
            now = time.perf_counter()
            self.seconds = before + now - started
            if self.step % 50 == 0:
                print(f"epoch {self.epochs:.2f}, {self.done:.0%}, loss {loss:.3f}", flush=True)
            if now - kept > self.args.every:
                self._save()
                kept = now
        self._save()

    def _train_step(self) -> float:
        images, labels = self._batch()
        share = self.done
        rate = RATE * min(1.0, share / WARM_UP, 0.5 * (1 + math.cos(math.pi * share)))
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.args.bfloat16):
            logits = self.network(images)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Augmented images and their labels, the next ones of the epoch's random order."""
        size, count = self.args.batch, len(self.data.train)
        each = count // size
        epoch, at = divmod(self.step, each)
        generator = torch.Generator().manual_seed(1000 * self.args.seed + epoch)
        rows = torch.randperm(count, generator=generator)[at * size : (at + 1) * size]
        images, labels = self.data.train.take(rows).batch()
        torch.manual_seed(self.args.seed + 7919 * self.step)  # the same after an interruption
        if self.args.auto:
            images = auto_augmented(images)
        images = self.data.augmentation(images, torch.Generator().manual_seed(self.step))
        if self.args.erase:
            images = torch.stack([ERASING(image) for image in images])
        if self.args.mix and torch.rand(()) < 0.5:
            mix = v2.RandomChoice([v2.CutMix(num_classes=CLASSES), v2.MixUp(num_classes=CLASSES)])
            images, labels = mix(images, labels)
        return images.to(self.args.device), labels.to(self.args.device)

    def _save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(self.file, lambda path: torch.save(state, path))

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"going on after {self.epochs:.2f} epochs")


MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
DEVIATION = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
AUTO = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
ERASING = v2.RandomErasing(0.25)


def auto_augmented(images: Tensor) -> Tensor:
    """Normalised images under AutoAugment, which takes pixels of 8 bits."""
    pixels = (255 * (images * DEVIATION + MEAN)).round().clamp(0, 255).to(torch.uint8)
    changed = torch.stack([AUTO(image) for image in pixels])
    return (changed.float() / 255 - MEAN) / DEVIATION


if __name__ == "__main__":
    main()
