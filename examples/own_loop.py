"""A fused model in a training loop of one's own.

python examples/own_loop.py
"""

import torch
import torch.nn.functional as F

import fastres
from fastres import data


def main(
    train_images: int = 3600, test_images: int = 1000, epochs: int = 3, batch_size: int = 64
) -> tuple[float, float]:
    """Train on the packaged sample; returns the last step's loss and the test accuracy."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = data.sample()
    few, held_out = torch.arange(train_images), torch.arange(test_images)
    train = data.Batches(
        sample.train[few].to(device), batch_size, sample.mean, sample.std, augment=True, seed=0
    )
    test = data.Batches(sample.test[held_out].to(device), batch_size, sample.mean, sample.std)

    model = fastres.resnet18(fused=True, stem="cifar", num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    model.train()
    for epoch in range(epochs):
        train.set_epoch(epoch)
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    print(f"test accuracy {right / test_images:.2%}")
    return loss.item(), right / test_images


if __name__ == "__main__":
    main()
