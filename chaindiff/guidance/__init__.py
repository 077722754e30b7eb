"""Guidance: denoisers composed of denoisers. All of it wraps; stages and solvers are unaware of it."""

from chaindiff.guidance.algebra import Guided, Weight, Wrapper, guided, interval
from chaindiff.guidance.classifier_free import classifier_free
from chaindiff.guidance.known import known
from chaindiff.guidance.threshold import thresholded

__all__ = ["Guided", "Weight", "Wrapper", "classifier_free", "guided", "interval", "known", "thresholded"]
