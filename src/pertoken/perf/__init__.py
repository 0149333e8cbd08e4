"""Prediction: what a model does on a GPU, with basis and interval."""

from pertoken.perf.point import Interval, Layout, Point, Prediction, StepTimes
from pertoken.perf.roofline import predict, step_times, utilisations
from pertoken.perf.search import Search, search

__all__ = [
    "Interval",
    "Layout",
    "Point",
    "Prediction",
    "Search",
    "StepTimes",
    "predict",
    "search",
    "step_times",
    "utilisations",
]
