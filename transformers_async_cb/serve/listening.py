"""A server that can be told to stop."""

from __future__ import annotations

import asyncio
from socket import socket

import uvicorn

from .app import Server, create_app


# Seconds after the requests that were left have failed, for clients to hear of it.
_FAREWELL = 5


class GracefulServer(uvicorn.Server):
    """Listens until it is interrupted or terminated. Then nobody new is let in, requests under way have some time to
    finish, and what is left fails with an error that its client gets.

    Args:
        server (`Server`): what answers.
        host (`str`), port (`int`): where to listen.
        grace (`float`): seconds that requests have to finish.
        settings: of `uvicorn.Config`.
    """

    def __init__(self, server: Server, host: str, port: int, grace: float, **settings: str | bool) -> None:
        config = uvicorn.Config(
            create_app(server), host=host, port=port, timeout_graceful_shutdown=int(grace) + _FAREWELL, **settings
        )
        super().__init__(config)
        self._server = server
        self._grace = grace

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._server.end)
        await super().shutdown(sockets)
