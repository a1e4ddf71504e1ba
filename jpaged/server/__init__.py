"""Server: an OpenAI-compatible HTTP server for an LLM.

Pipeline: HTTP client -> [server] -> llm, and back.

`python -m jpaged.server --model NAME` starts it; `jpaged.server.app.create_app` returns
the ASGI application for an LLM that exists already. Both need the extra `server`.
"""
