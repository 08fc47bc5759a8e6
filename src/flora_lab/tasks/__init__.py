"""The tasks, one file each: the data, the model, and how a prediction is evaluated (``base.Task``).

What they share lies in rooms: `data` (read, check, split), `models` (load, and put a head on a backbone), `evaluation`
(compare answers, measure precision) and `diffusion`. Data never import models, and neither imports an evaluation.
"""

from flora_lab.tasks.base import Examples, Task
from flora_lab.tasks.glue import Glue
from flora_lab.tasks.image_classification import ImageClassification
from flora_lab.tasks.instance_segmentation import InstanceSegmentation
from flora_lab.tasks.language import Language
from flora_lab.tasks.oriented_detection import OrientedDetection
from flora_lab.tasks.semantic_segmentation import SemanticSegmentation
from flora_lab.tasks.text_classification import TextClassification
from flora_lab.tasks.text_to_image import TextToImage
from flora_lab.tasks.visual_instruction import VisualInstruction

TASKS: dict[str, type[Task]] = {
    "image_classification": ImageClassification,
    "glue": Glue,
    "text_classification": TextClassification,
    "semantic_segmentation": SemanticSegmentation,
    "instance_segmentation": InstanceSegmentation,
    "text_to_image": TextToImage,
    "language": Language,
    "visual_instruction": VisualInstruction,
    "oriented_detection": OrientedDetection,
}

__all__ = ["TASKS", "Examples", "Task"]
