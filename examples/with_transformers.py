"""A fused model in the Hugging Face Trainer.

pip install -e '.[examples]' && python examples/with_transformers.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

import fastres
from fastres import data


class Classifier(nn.Module):
    """ResNet-18, called and answering in the way that the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fastres.resnet18(fused=True, stem="cifar", num_classes=10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Pictures(Dataset):
    """Normalised images and labels, under the names of Classifier's arguments."""

    def __init__(self, part: data.ImageSet, count: int) -> None:
        sample = data.sample()
        self.images = data.normalize(part.images[:count], sample.mean, sample.std)
        self.labels = part.labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images whose class is right."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(
    train_images: int = 3600, test_images: int = 1000, epochs: int = 3, batch_size: int = 64
) -> tuple[float, float]:
    """Train on the packaged sample; returns the last step's loss and the test accuracy."""
    set_seed(0)
    sample = data.sample()
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Pictures(sample.train, train_images),
            eval_dataset=Pictures(sample.test, test_images),
            compute_metrics=accuracy,
            optimizers=(optimizer, None),
        )
        trainer.train()
        tested = trainer.evaluate()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses[-1], tested["eval_accuracy"]


if __name__ == "__main__":
    main()
