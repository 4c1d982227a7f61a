"""A model behind an OpenAI-compatible API.

app.py (the routes), auth.py (the bearer token), requests.py and validation.py (bodies, checked), service.py (a request from
its body to its last byte), scheduler.py (which request is decoded when), steps.py (its steps), streaming.py (from the
decoding thread to the event loop), responses.py (OpenAI's forms), metrics.py, model.py (what is served), page.html (a chat).
"""
