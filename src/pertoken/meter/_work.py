"""A predictor of engine seconds from `perf`: what prefill and decode of an hour's tokens take where nobody
tells."""

from __future__ import annotations

from pertoken import catalog
from pertoken.errors import CannotServeError, NoEvidenceError
from pertoken.meter._claims import Served, Work
from pertoken.perf.point import Layout, Point

_CONCURRENCY = 16.0
"""Requests in flight assumed; the share of prefill hardly moves with it, and only the share is used."""
_LAYOUTS = (1, 2, 4, 8, 16)


def predicted_work(served: Served) -> Work:
    """Seconds of prefill and decode of a model's tokens by the roofline.

    Parameters: served, with GPU and model as the catalogue names them. Formula: busy s = output tokens ÷
    predicted tokens/s; prefill s = busy × predicted prefill share. Raises UnknownNameError for a model or
    GPU the catalogue lacks, CannotServeError where it fits no 16 GPUs, NoEvidenceError without requests or
    output tokens.
    """
    from pertoken.perf import predict

    if not served.requests or not served.output_tokens:
        raise NoEvidenceError(f"{served.model!r} has no count of requests: their length is unknown")
    model, gpu = catalog.model(served.model), catalog.gpu(served.gpu)
    failure: CannotServeError | None = None
    for degree in _LAYOUTS:
        point = Point(
            input_tokens=(served.input_tokens + served.cached_input_tokens) / served.requests,
            output_tokens=max(1.0, served.output_tokens / served.requests),
            concurrency=_CONCURRENCY,
            cached_input_tokens=served.cached_input_tokens / served.requests,
            precision=model.native_precision,
            engine=served.engine,
            layout=Layout(tp=degree),
        )
        try:
            found = predict(model, gpu, point)
        except CannotServeError as error:
            failure = error
            continue
        busy_s = served.output_tokens / float(found.tokens_per_s.value)
        share = float(found.prefill_fraction)
        return Work(busy_s * share, busy_s * (1 - share), found.basis)
    raise failure or NoEvidenceError(f"no layout of {served.model!r} on {served.gpu} was tried")
