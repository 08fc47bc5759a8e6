"""The jobs, one file each: what data there is, what model, how a prediction is judged (``base.Task``).

`data` splits and checks examples for them, `pictures` reads those that are pictures, `pretrained` their models.
"""

from flora_lab.tasks.base import Examples, Task
from flora_lab.tasks.glue import Glue
from flora_lab.tasks.image_classification import ImageClassification
from flora_lab.tasks.instance_segmentation import InstanceSegmentation
from flora_lab.tasks.semantic_segmentation import SemanticSegmentation

TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
    "glue": Glue,
    "semantic_segmentation": SemanticSegmentation,
    "instance_segmentation": InstanceSegmentation,
}

__all__ = ["TASKS", "Examples", "Task"]
