"""The tasks, one file each: the data, the model, and how a prediction is evaluated (``base.Task``).

Shared by them: `data` splits and checks examples, `pictures` reads pictures, `pretrained` and `backbone` load models.
"""

from flora_lab.tasks.base import Examples, Task
from flora_lab.tasks.glue import Glue
from flora_lab.tasks.image_classification import ImageClassification
from flora_lab.tasks.instance_segmentation import InstanceSegmentation
from flora_lab.tasks.semantic_segmentation import SemanticSegmentation
from flora_lab.tasks.text_to_image import TextToImage

TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
    "glue": Glue,
    "semantic_segmentation": SemanticSegmentation,
    "instance_segmentation": InstanceSegmentation,
    "text_to_image": TextToImage,
}

__all__ = ["TASKS", "Examples", "Task"]
