"""A small convolutional classifier of Fashion-MNIST: its features carry the Frechet distance, its answers the accuracy.

Its weights, in half precision, are committed beside this file, so that all samples are measured by one network:

    python -m studies.routing classifier --work WORK      trains it again

Shape legend: N images, H = W image size, F features, K classes.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe_dist.evaluation.metrics import Moments, Statistics
from studies.routing.images import to_model

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
CLASSES = 10
FEATURES = 96
_BATCH = 250
_EPOCHS = 5
_LR = 3e-3


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, FEATURES)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if outputs != FEATURES else []
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) uint8 to (N, F): the mean of each channel over the image."""
        return self.layers(to_model(images)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) uint8 to (N, K) logits."""
        return self.head(self.features(images))


def train_classifier(images: Tensor, labels: Tensor) -> Classifier:
    """Trained on (N, 1, H, W) uint8 images, which are mirrored at random, and rounded to half precision; seed 0."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_EPOCHS * (len(images) // _BATCH))
    for _ in range(_EPOCHS):
        order = torch.randperm(len(images)).split(_BATCH)
        for rows in order[: len(images) // _BATCH]:
            batch = images[rows]
            mirrored = torch.rand(len(batch)) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.half().float().eval()


def save_classifier(model: Classifier) -> None:
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, WEIGHTS)


def load_classifier() -> Classifier:
    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.float().eval()


@torch.no_grad()
def look(model: Classifier, images: Tensor) -> tuple[Statistics, Tensor]:
    """Mean and covariance of the features of (N, 1, H, W) uint8 images, and the class of each, (N,)."""
    moments, classes = Moments(FEATURES, torch.device("cpu")), []
    for batch in images.split(_BATCH):
        features = model.features(batch)
        moments.add(features)
        classes.append(model.head(features).argmax(dim=1))
    return moments.statistics(), torch.cat(classes)


def accuracy_by_class(found: Tensor, labels: Tensor) -> list[float]:
    """Of each class the part of its images that the classifier takes for it."""
    right = (found == labels).double()
    return [float(right[labels == label].mean()) for label in range(CLASSES)]


def describe(model: Classifier, images: Tensor, labels: Tensor, reference: Statistics) -> dict[str, Any]:
    """What is known of the classifier, from images that it was not trained on."""
    from diffmoe_dist.evaluation.metrics import frechet_distance

    statistics, found = look(model, images)
    by_class = accuracy_by_class(found, labels)
    return {
        "accuracy": sum(by_class) / len(by_class),
        "accuracy_by_class": by_class,
        "frechet_of_test_images": frechet_distance(statistics, reference),
        "frechet_of_5000_test_images": frechet_distance(look(model, images[:5000])[0], reference),
    }
