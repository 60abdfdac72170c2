"""The HTTP service: ``create_app`` builds it from ``Settings``; it knows mcdrop, never the reverse."""

from service.app import create_app
from service.settings import Settings

__all__ = ["Settings", "create_app"]
