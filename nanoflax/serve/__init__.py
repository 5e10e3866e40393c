"""Serving a model: the engine that batches requests, the HTTP server, and its page."""

from nanoflax.serve.engine import Engine
from nanoflax.serve.requests import Constraint, Finish, Request, Ticket, Token
from nanoflax.serve.serving import LOCAL, check_installed, listen, serve, service_of
from nanoflax.serve.settings import Settings

__all__ = [
    "Constraint",
    "Engine",
    "Finish",
    "LOCAL",
    "Request",
    "Settings",
    "Ticket",
    "Token",
    "check_installed",
    "listen",
    "serve",
    "service_of",
]
