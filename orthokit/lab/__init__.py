"""Real data, small models, a training loop and a store of runs: everything a claim can be tested on."""

from orthokit.lab import arena
from orthokit.lab.baselines import Lion
from orthokit.lab.contestants import CONTESTANTS, Contestant, contestant, contestants
from orthokit.lab.continual import ClassSplit, Replay, class_sequence, class_split
from orthokit.lab.corpora import Corpus, corpora, corpus
from orthokit.lab.encoder import EncoderConfig, SentenceClassifier, SentenceEncoder
from orthokit.lab.eras import eras
from orthokit.lab.example_gradients import per_example_gradients, task_scores, trainable_parameters
from orthokit.lab.families import (
    Expert,
    expert_model,
    expert_scores,
    expert_statistics,
    family_base,
    family_retention,
    train_expert,
)
from orthokit.lab.family_tasks import FAMILIES, Family, FamilyTask
from orthokit.lab.fisher import Collinearity, RankOneFisher, collinearity, fisher_diagonal, rank_one_fisher
from orthokit.lab.fit import fit
from orthokit.lab.glosses import glosses
from orthokit.lab.image_tasks import SomeClasses, some_classes
from orthokit.lab.images import images
from orthokit.lab.input_subspaces import InputSubspaces
from orthokit.lab.models import SIZES, SmallCNN, TinyGPT, TinyGPTConfig
from orthokit.lab.pretrained import PRETRAINED, load_pretrained, pretrained_weights
from orthokit.lab.probes import GradientRecorder, stationary_gradients
from orthokit.lab.projection import GradientProjection, GradientSubspace
from orthokit.lab.racer import Racer
from orthokit.lab.regularisers import EWC, L2SP, Penalties, Penalty, RankOneEWC
from orthokit.lab.runs import Run, runs
from orthokit.lab.schedules import SCHEDULES, lr_factor
from orthokit.lab.tasks import Task, image_classification, language_modelling, task, tasks
from orthokit.lab.text_tasks import text_classification, tokenize
from orthokit.lab.vision import SmallViT, load_small_vit

__all__ = [
    "CONTESTANTS",
    "EWC",
    "FAMILIES",
    "L2SP",
    "PRETRAINED",
    "SCHEDULES",
    "SIZES",
    "ClassSplit",
    "Collinearity",
    "Contestant",
    "Corpus",
    "EncoderConfig",
    "Expert",
    "Family",
    "FamilyTask",
    "GradientProjection",
    "GradientRecorder",
    "GradientSubspace",
    "InputSubspaces",
    "Lion",
    "Penalties",
    "Penalty",
    "Racer",
    "RankOneEWC",
    "RankOneFisher",
    "Replay",
    "Run",
    "SentenceClassifier",
    "SentenceEncoder",
    "SmallCNN",
    "SmallViT",
    "SomeClasses",
    "Task",
    "TinyGPT",
    "TinyGPTConfig",
    "arena",
    "class_sequence",
    "class_split",
    "collinearity",
    "contestant",
    "contestants",
    "corpora",
    "corpus",
    "eras",
    "expert_model",
    "expert_scores",
    "expert_statistics",
    "family_base",
    "family_retention",
    "fisher_diagonal",
    "fit",
    "glosses",
    "image_classification",
    "images",
    "language_modelling",
    "load_pretrained",
    "load_small_vit",
    "lr_factor",
    "per_example_gradients",
    "pretrained_weights",
    "rank_one_fisher",
    "runs",
    "some_classes",
    "stationary_gradients",
    "task",
    "task_scores",
    "tasks",
    "text_classification",
    "tokenize",
    "train_expert",
    "trainable_parameters",
]
