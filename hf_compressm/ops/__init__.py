"""Scans: a plain reference beside each fast form."""

from .lru import lru_scan, lru_scan_reference


__all__ = ["lru_scan", "lru_scan_reference"]
