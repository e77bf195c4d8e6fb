"""A fused model in Lightning.

pip install -e '.[examples]' && python examples/with_lightning.py
"""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastres
from fastres import data


class Classifier(lightning.LightningModule):
    """ResNet-18 for 32 x 32 images in ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fastres.resnet18(fused=True, stem="cifar", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


def main(
    train_images: int = 3600, test_images: int = 1000, epochs: int = 3, batch_size: int = 64
) -> tuple[float, float]:
    """Train on the packaged sample; returns the last step's loss and the test accuracy."""
    lightning.seed_everything(0)
    sample = data.sample()

    def loader(part: data.ImageSet, count: int, shuffle: bool) -> DataLoader:
        images = data.normalize(part.images[:count], sample.mean, sample.std)
        return DataLoader(TensorDataset(images, part.labels[:count]), batch_size, shuffle=shuffle)

    classifier = Classifier()
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(classifier, loader(sample.train, train_images, shuffle=True))
    loss = float(trainer.callback_metrics["train_loss"])
    (tested,) = trainer.test(classifier, loader(sample.test, test_images, shuffle=False))
    return loss, tested["test_accuracy"]


if __name__ == "__main__":
    main()
