"""Palisade: face presentation attack detection that stays good while a fleet of sites drifts."""

__version__ = "0.1.0"
