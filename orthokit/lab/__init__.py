"""Real data, small models, a training loop and a store of runs: everything a claim can be tested on."""

from orthokit.lab.corpora import Corpus, corpora, corpus
from orthokit.lab.fit import fit
from orthokit.lab.glosses import glosses
from orthokit.lab.images import images
from orthokit.lab.models import SIZES, SmallCNN, TinyGPT, TinyGPTConfig
from orthokit.lab.runs import Run, runs
from orthokit.lab.schedules import SCHEDULES, lr_factor
from orthokit.lab.tasks import Task, image_classification, language_modelling, task, tasks

__all__ = [
    "SCHEDULES",
    "SIZES",
    "Corpus",
    "Run",
    "SmallCNN",
    "Task",
    "TinyGPT",
    "TinyGPTConfig",
    "corpora",
    "corpus",
    "fit",
    "glosses",
    "image_classification",
    "images",
    "language_modelling",
    "lr_factor",
    "runs",
    "task",
    "tasks",
]
