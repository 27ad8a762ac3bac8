"""What others get to see of a model: its card, its figures, its code, and stock checkpoints."""

from .card import PLOT_NAME, build_card
from .publish import CARD_NAME, Publication, copy_published, write_card
from .remote_code import bundle_remote_code
from .run import Run
from .stock import to_stock

__all__ = [
    "CARD_NAME",
    "PLOT_NAME",
    "Publication",
    "Run",
    "build_card",
    "bundle_remote_code",
    "copy_published",
    "to_stock",
    "write_card",
]
