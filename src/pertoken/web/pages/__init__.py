"""The pages people look at, a file each: `ROUTERS` holds their routes."""

from __future__ import annotations

from fastapi import APIRouter

from pertoken.web.pages import where

ROUTERS: tuple[APIRouter, ...] = (where.router,)
