"""Real data, small models, a training loop and a store of runs: everything a claim can be tested on."""

from orthokit.lab.baselines import Lion
from orthokit.lab.contestants import CONTESTANTS, Contestant, contestant, contestants
from orthokit.lab.corpora import Corpus, corpora, corpus
from orthokit.lab.encoder import EncoderConfig, SentenceClassifier, SentenceEncoder
from orthokit.lab.fit import fit
from orthokit.lab.glosses import glosses
from orthokit.lab.images import images
from orthokit.lab.models import SIZES, SmallCNN, TinyGPT, TinyGPTConfig
from orthokit.lab.pretrained import PRETRAINED, load_pretrained, pretrained_weights
from orthokit.lab.probes import GradientRecorder, stationary_gradients
from orthokit.lab.racer import Racer
from orthokit.lab.runs import Run, runs
from orthokit.lab.schedules import SCHEDULES, lr_factor
from orthokit.lab.tasks import Task, image_classification, language_modelling, task, tasks
from orthokit.lab.text_tasks import text_classification, tokenize

__all__ = [
    "CONTESTANTS",
    "PRETRAINED",
    "SCHEDULES",
    "SIZES",
    "Contestant",
    "Corpus",
    "EncoderConfig",
    "GradientRecorder",
    "Lion",
    "Racer",
    "Run",
    "SentenceClassifier",
    "SentenceEncoder",
    "SmallCNN",
    "Task",
    "TinyGPT",
    "TinyGPTConfig",
    "contestant",
    "contestants",
    "corpora",
    "corpus",
    "fit",
    "glosses",
    "image_classification",
    "images",
    "language_modelling",
    "load_pretrained",
    "lr_factor",
    "pretrained_weights",
    "runs",
    "stationary_gradients",
    "task",
    "tasks",
    "text_classification",
    "tokenize",
]
