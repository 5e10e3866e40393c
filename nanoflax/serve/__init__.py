"""Serving a model: the engine that batches requests, the HTTP server, and its page."""

from nanoflax.serve.engine import Engine, Finish, Request, Ticket, Token

__all__ = ["Engine", "Finish", "Request", "Ticket", "Token"]
