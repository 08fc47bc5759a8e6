"""Image classification: scikit-learn's handwritten digits, and a small ConvNeXt V2 to tell them apart."""

from dataclasses import dataclass, field

DIGITS = range(10)


@dataclass
class Domain:
    """Which images there are and how they are shown."""

    classes: list[int] = field(default_factory=lambda: list(DIGITS), metadata={"help": "the digits to tell apart"})
    rotate: int = field(default=0, metadata={"help": "degrees, counter-clockwise", "choices": (0, 90, 180, 270)})
    invert: bool = field(default=False, metadata={"help": "dark digits on light ground"})


@dataclass
class ImageClassification:
    name: str = field(default="image_classification", metadata={"help": "the job"})
    source: Domain = field(default_factory=Domain)
    target: Domain = field(default_factory=Domain)
    train_share: float = field(default=0.4, metadata={"help": "share of the images to learn from", "above": 0})
    validation_share: float = field(default=0.2, metadata={"help": "share to tune on; the rest: test", "above": 0})
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64, 128], metadata={"help": "channels of each stage"})
    depths: list[int] = field(default_factory=lambda: [2, 2, 2], metadata={"help": "blocks of each stage"})

    head = ("classifier",)
    metric = "accuracy"

    def __post_init__(self):
        for domain in ("source", "target"):
            classes = getattr(self, domain).classes
            if len(set(classes)) < max(2, len(classes)) or not set(classes) <= set(DIGITS):
                raise ValueError(f"task.{domain}.classes={classes}: expected two or more different digits from 0 to 9")
        if self.train_share + self.validation_share >= 1:
            raise ValueError(
                f"task.train_share={self.train_share} and task.validation_share={self.validation_share}: "
                "their sum must be below 1, the rest is the test split"
            )
        if len(self.hidden_sizes) != len(self.depths) or min([*self.hidden_sizes, *self.depths], default=0) < 1:
            raise ValueError(
                f"task.hidden_sizes={self.hidden_sizes} and task.depths={self.depths}: "
                "expected lists of positive integers, of the same length"
            )

    def splits(self, domain: str, seed: int) -> dict[str, list[dict]]:
        import torch
        from sklearn.datasets import load_digits

        shown: Domain = getattr(self, domain)
        digits = load_digits()
        images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]  # (n, 1, 8, 8) from -1 to 1
        images = torch.rot90(images, shown.rotate // 90, dims=(2, 3)) * (-1 if shown.invert else 1)
        examples = [
            {"pixel_values": image, "labels": shown.classes.index(digit)}
            for image, digit in zip(images, digits.target.tolist(), strict=True)
            if digit in shown.classes
        ]
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        examples = [examples[i] for i in order]
        first = round(len(examples) * self.train_share)
        second = first + round(len(examples) * self.validation_share)
        return {"train": examples[:first], "validation": examples[first:second], "test": examples[second:]}

    def model(self, domain: str):
        from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

        config = ConvNextV2Config(
            image_size=8,
            num_channels=1,
            patch_size=1,  # the images are small enough: no pixel is thrown away
            num_stages=len(self.depths),
            depths=self.depths,
            hidden_sizes=self.hidden_sizes,
            num_labels=len(getattr(self, domain).classes),
        )
        return ConvNextV2ForImageClassification(config)

    def metrics(self, prediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
