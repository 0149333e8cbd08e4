"""The pages people look at, a file each: `ROUTERS` holds their routes."""

from __future__ import annotations

from fastapi import APIRouter

from pertoken.web import live
from pertoken.web.pages import budgets, by, energy, now, planning, sources, variance, where

ROUTERS: tuple[APIRouter, ...] = (
    now.router,
    live.router,
    where.router,
    by.router,
    variance.router,
    planning.router,
    budgets.router,
    energy.router,
    sources.router,
)
