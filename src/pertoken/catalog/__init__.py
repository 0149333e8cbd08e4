"""Facts with source and date: GPUs, models, tariffs, prices. Rows of data, read once, never edited in place.

One of a kind by name is here; the lists are in the modules (`pertoken.catalog.gpus.gpus()` and so on).
"""

from pertoken.catalog.gpus import Gpu, gpu
from pertoken.catalog.models import Model, model, model_from_config
from pertoken.catalog.prices import api_price, price
from pertoken.catalog.tariffs import Tariff, tariff, tariff_from_csv, tariff_from_urdb

__all__ = [
    "Gpu",
    "Model",
    "Tariff",
    "api_price",
    "gpu",
    "model",
    "model_from_config",
    "price",
    "tariff",
    "tariff_from_csv",
    "tariff_from_urdb",
]
