"""Request-level simulation of serving: what a traffic shape does to replicas, latency, SLO and energy."""

from pertoken.perf.simulate._cluster import simulate
from pertoken.perf.simulate._find import Found, find_replicas
from pertoken.perf.simulate._requests import Given, Requests, Source, Traffic
from pertoken.perf.simulate._result import Series, Simulation, Slo
from pertoken.perf.simulate._settings import Autoscale, Engine, ReplicaGroup
from pertoken.perf.simulate._traces import Trace, read_trace
from pertoken.perf.simulate._workload import per_accepted_token, serving_slo, serving_source

__all__ = [
    "Autoscale",
    "Engine",
    "Found",
    "Given",
    "ReplicaGroup",
    "Requests",
    "Series",
    "Simulation",
    "Slo",
    "Source",
    "Trace",
    "Traffic",
    "find_replicas",
    "per_accepted_token",
    "read_trace",
    "serving_slo",
    "serving_source",
    "simulate",
]
