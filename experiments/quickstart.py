"""DANN from MNIST to another kind of digits in a dozen lines; run ``python scripts/prepare_digits.py`` first.

python experiments/quickstart.py
"""

from __future__ import annotations

from lightning.pytorch import seed_everything

from framework import DANN, DomainPairDataModule, Trainer


def main(digits: str = "data/digits", max_epochs: int = 5, steps_per_epoch: int = 100) -> float:
    """Train, and return the accuracy of the last weights on the target's test images."""
    seed_everything(0)
    data = DomainPairDataModule(
        source=f"{digits}/mnist/train",
        target=f"{digits}/optdigits/train",
        target_test=f"{digits}/optdigits/test",
        batch_size=64,
        steps_per_epoch=steps_per_epoch,
        image_size=28,
        crop="pad",
        horizontal_flip=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    model = DANN(
        data.num_classes,
        backbone="resnet8",
        backbone_learning_rate_factor=1.0,  # nothing is pretrained
        learning_rate=0.05,
        schedule="cosine",
        domain_weighting="mean",
        discriminator_normalization="none",
    )
    trainer = Trainer(experiment="quickstart", max_epochs=max_epochs)
    trainer.fit(model, data)
    scores = trainer.test(model, data)
    return scores[0]["test/accuracy"]


if __name__ == "__main__":
    print(f"Accuracy on the target's test images: {main():.1%}")
