"""The arena: pretrained model x method x learning rate x seed, judged on what was learnt and on what was forgotten."""

from orthokit.lab.arena.entry import enter
from orthokit.lab.arena.grounds import GROUNDS, Ground
from orthokit.lab.arena.methods import METHODS, Method, budget_settings, trainable

__all__ = ["GROUNDS", "METHODS", "Ground", "Method", "budget_settings", "enter", "trainable"]
