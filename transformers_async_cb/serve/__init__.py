"""An HTTP server with the routes of OpenAI's interface, over one manager."""
