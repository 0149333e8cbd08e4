"""Request-level simulation of serving: what a traffic shape does to replicas, latency, SLO and energy."""

from pertoken.perf.simulate._cluster import Autoscale, Engine, Found, ReplicaGroup, find_replicas, simulate
from pertoken.perf.simulate._requests import Given, Requests, Source, Traffic
from pertoken.perf.simulate._result import Series, Simulation, Slo
from pertoken.perf.simulate._traces import Trace, read_trace
from pertoken.perf.simulate._workload import serving_slo, serving_source

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
    "read_trace",
    "serving_slo",
    "serving_source",
    "simulate",
]
