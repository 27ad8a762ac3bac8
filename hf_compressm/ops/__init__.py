"""Scans: a plain reference beside each fast form."""

from .causal_conv import causal_conv
from .gated_scan import gated_scan, gated_scan_reference
from .lru import lru_scan, lru_scan_reference
from .selective_scan import selective_scan, selective_scan_reference
from .ssd import ssd_scan, ssd_scan_reference

__all__ = [
    "causal_conv",
    "gated_scan",
    "gated_scan_reference",
    "lru_scan",
    "lru_scan_reference",
    "selective_scan",
    "selective_scan_reference",
    "ssd_scan",
    "ssd_scan_reference",
]
