"""Request-level simulation of serving: what a traffic shape does to replicas, latency, SLO and energy."""

from pertoken.perf.simulate._cluster import Autoscale, Engine, Found, ReplicaGroup, find_replicas, simulate
from pertoken.perf.simulate._requests import Given, Requests, Source, Traffic
from pertoken.perf.simulate._result import Simulation, Slo

__all__ = [
    "Autoscale",
    "Engine",
    "Found",
    "Given",
    "ReplicaGroup",
    "Requests",
    "Simulation",
    "Slo",
    "Source",
    "Traffic",
    "find_replicas",
    "simulate",
]
