"""The arena: pretrained model x method x learning rate x seed, judged on what was learnt and on what was forgotten."""

from orthokit.lab.arena.contest import compete
from orthokit.lab.arena.entry import enter
from orthokit.lab.arena.ground import Ground
from orthokit.lab.arena.grounds import GROUNDS, add_ground, figures_at_start, judged
from orthokit.lab.arena.hugging_face import hugging_face_ground
from orthokit.lab.arena.methods import METHODS, Method, budget_settings, trainable
from orthokit.lab.arena.portraits import DIAGNOSTICS, Portrait, portrait
from orthokit.lab.arena.rates import FIRST_RATES, first_rate
from orthokit.lab.arena.rewinding import ALPHAS, PATHS, SCALES, paths_of, rewound
from orthokit.lab.arena.running import arena_rows, run_arena
from orthokit.lab.arena.weights import effective_weight, weights_after

__all__ = [
    "ALPHAS",
    "DIAGNOSTICS",
    "FIRST_RATES",
    "GROUNDS",
    "METHODS",
    "PATHS",
    "SCALES",
    "Ground",
    "Method",
    "Portrait",
    "add_ground",
    "arena_rows",
    "budget_settings",
    "compete",
    "effective_weight",
    "enter",
    "figures_at_start",
    "first_rate",
    "hugging_face_ground",
    "judged",
    "paths_of",
    "portrait",
    "rewound",
    "run_arena",
    "trainable",
    "weights_after",
]
