"""The jobs, one file each: what data there is, what model, how a prediction is judged.

A task is a dataclass. Its fields are its keys in a YAML, under `task:`; what it knows is told by

    head                  names of the modules that are always trained: the new output layer
    metric                the name of the number to report, one that `metrics` returns
    splits(domain, seed)  "train", "validation" and "test": lists of examples, each the keywords of the model's forward
    model(domain)         a model for that domain with fresh weights, drawn from torch's generator
    metrics(prediction)   numbers of a transformers `EvalPrediction`

There are two domains: "source", which the base model is trained on, and "target", which it is adapted to.
How anything is trained is no task's business; that is `flora.train`.
"""

from flora.tasks.image_classification import ImageClassification

Examples = list[dict]
TASKS = {"image_classification": ImageClassification}
